// Where the keys of a sequence lie in a cache. A contiguous cache is one of a single page per sequence.
#pragma once

#include "../../call/params.h"

namespace fastattn {
namespace cuda {

// A page, and a row in it: what a cache's stride_b and stride_s count.
struct Place {
  int64_t page, row;
};

// A page's number as found in the table; a wrong one must not lead out of the cache.
__device__ __forceinline__ int64_t existing_page(const Params& p, int64_t page) {
  return bounded(page, p.num_pages - 1);
}

// The place of a position below the capacity, p.seqlen_k.
__device__ __forceinline__ Place place_of(const Params& p, int64_t b, int64_t position) {
  if (p.block_table == nullptr) return {b, position};
  return {existing_page(p, p.block_table[b * p.max_pages + position / p.page_size]), position % p.page_size};
}

}  // namespace cuda
}  // namespace fastattn
