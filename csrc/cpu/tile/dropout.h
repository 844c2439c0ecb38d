// The dropout mask of a block, from Philox4x32-10 (Salmon et al., SC 2011): a pure function of seed and position.
#pragma once

#include "mask.h"

namespace fastattn {
namespace FASTATTN_ISA {

// The four words of each lane's counter, in place. The lane loops are what the compiler vectorises.
template <int kLanes>
void philox(uint32_t (&c)[4][kLanes], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c[0][lane], p1 = uint64_t(0xCD9E8D57u) * c[2][lane];
      c[0][lane] = uint32_t(p1 >> 32) ^ c[1][lane] ^ key0;
      c[1][lane] = uint32_t(p1);
      c[2][lane] = uint32_t(p0 >> 32) ^ c[3][lane] ^ key1;
      c[3][lane] = uint32_t(p0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// factors[key][lane] = 0 or `kept`, for the keys of a tile.
template <class V>
void make_dropout(const Params& p, const Panel<V>& panel, KeyTile tile, typename V::Scalar kept,
                  typename V::Scalar* factors) {
  using S = typename V::Scalar;
  constexpr int kLanes = Panel<V>::kLanes;
  const int64_t first_query = q_offset_of(p, panel.b);
  for (int64_t quad = tile.n_begin / 4; quad * 4 < tile.n_end(); ++quad) {
    uint32_t words[4][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      words[0][lane] = uint32_t(quad);
      words[1][lane] = uint32_t(first_query + panel.query[lane]);
      words[2][lane] = uint32_t(panel.b * p.heads_q + panel.head[lane]);
      words[3][lane] = 0;
    }
    philox<kLanes>(words, p.seed);
    for (int w = 0; w < 4; ++w) {
      const int64_t n = quad * 4 + w - tile.n_begin;
      if (n < 0 || n >= tile.count) continue;
      for (int lane = 0; lane < kLanes; ++lane)
        factors[n * kLanes + lane] = words[w][lane] >= p.dropout_threshold ? kept : S(0);
    }
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
