// Writes new keys and values into a cache, contiguous or paged. Rotary embedding (Su et al., 2021) turns keys and
// queries by the angles of their positions on the way: keys into the cache, queries into the workspace.
//
// One warp per row. Each element is read and written once; a call has few of them, compared to those in its cache.
#pragma once

#include "../common/arguments.h"
#include "../common/paged_cache.h"

namespace fastattn {
namespace cuda {

template <class Element_>
struct AppendKvTraits {
  using Element = Element_;
  static constexpr int kThreads = 128;
  static constexpr int kBlockRows = kThreads / 32;
  static constexpr int kSharedBytes = 0;
};

// A row of a tensor, element by element.
struct Row {
  uint16_t* data;
  int64_t stride;

  __device__ __forceinline__ Row(const View& view, int64_t b, int64_t head, int64_t position)
      : data(static_cast<uint16_t*>(view.data) + b * view.stride_b + head * view.stride_h + position * view.stride_s),
        stride(view.stride_d) {}
  __device__ __forceinline__ uint16_t& operator[](int64_t i) const { return data[i * stride]; }
};

__device__ __forceinline__ void copy_elements(const Row& from, const Row& to, int64_t first, int64_t end, int lane) {
  for (int64_t i = first + lane; i < end; i += 32) to[i] = from[i];
}

template <class Element>
__device__ __forceinline__ void copy_rotated(const Params& p, const Row& from, const Row& to, int64_t position,
                                             int lane) {
  const int64_t half = p.rotary_dim / 2;
  // A query before the first position sees nothing: any angle will do. A wrong length must not lead out of the tables.
  const int64_t at = bounded(position, p.rotary_positions - 1) * half;
  for (int64_t i = lane; i < half; i += 32) {
    const float cos = static_cast<const float*>(p.cos)[at + i], sin = static_cast<const float*>(p.sin)[at + i];
    const int64_t first = p.rotary_interleaved ? 2 * i : i, second = p.rotary_interleaved ? 2 * i + 1 : i + half;
    const float x = Element::unpack(from[first]).x, y = Element::unpack(from[second]).x;
    const uint32_t rotated = Element::pack(x * cos - y * sin, y * cos + x * sin);
    to[first] = static_cast<uint16_t>(rotated);
    to[second] = static_cast<uint16_t>(rotated >> 16);
  }
  copy_elements(from, to, p.rotary_dim, p.head_dim, lane);
}

// Rows are numbered (batch, head, position): first those of new keys, then those of queries that are to be rotated.
template <class T>
__device__ __forceinline__ void append_kv(const Arguments& a) {
  const Params& p = a.p;
  const int lane = threadIdx.x % 32;
  int64_t row = static_cast<int64_t>(blockIdx.x) * T::kBlockRows + threadIdx.x / 32;
  const int64_t new_rows = p.batch * p.heads_kv * p.seqlen_new;
  if (row < new_rows) {
    const int64_t t = row % p.seqlen_new, head = row / p.seqlen_new % p.heads_kv, b = row / p.seqlen_new / p.heads_kv;
    const int64_t position = p.kv_lengths[b] + t;
    if (position < 0 || position >= p.seqlen_k) return;
    const Place place = place_of(p, b, position);
    copy_rotated<typename T::Element>(p, Row(p.k_new, b, head, t), Row(p.k, place.page, head, place.row), position,
                                      lane);
    copy_elements(Row(p.v_new, b, head, t), Row(p.v, place.page, head, place.row), 0, p.head_dim_v, lane);
    return;
  }
  row -= new_rows;
  if (a.q_rotated.data == nullptr || row >= p.batch * p.heads_q * p.seqlen_q) return;
  const int64_t i = row % p.seqlen_q, head = row / p.seqlen_q % p.heads_q, b = row / p.seqlen_q / p.heads_q;
  copy_rotated<typename T::Element>(p, Row(p.q, b, head, i), Row(a.q_rotated, b, head, i), i + sequence_of(p, b).offset,
                                    lane);
}

}  // namespace cuda
}  // namespace fastattn
