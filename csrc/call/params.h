// The native description of an attention call: plain structs, filled from Python, read by every kernel.
// No torch, no Python. Sizes count elements; strides are in elements and may be 0 (broadcast) but not negative.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_HOST_DEVICE __host__ __device__
#else
#define FASTATTN_HOST_DEVICE
#endif

namespace fastattn {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A tensor of up to four dimensions; data is null where the call has no such tensor.
struct View {
  void* data = nullptr;
  int64_t stride_b = 0;  // batch; 0 for varlen tensors, whose sequences lie behind one another
  int64_t stride_h = 0;  // head
  int64_t stride_s = 0;  // position in the sequence
  int64_t stride_d = 0;  // feature (bias and mask: key)
};

// Keeps what rounding takes from small numbers above the smallest that float16 has; it stays below half of the number.
constexpr float kResidualScale = 256.0f;

struct Params {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads_q = 0, heads_kv = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // per sequence; varlen: totals; cache: capacity
  int64_t head_dim = 0, head_dim_v = 0;

  View q;         // (batch, heads_q, seqlen_q, head_dim)
  View k;         // (batch, heads_kv, seqlen_k, head_dim); paged: (num_pages, heads_kv, page_size, head_dim)
  View v;         // (batch, heads_kv, seqlen_k, head_dim_v); paged: likewise
  View out;       // (batch, heads_q, seqlen_q, head_dim_v)
  View lse;       // (batch, heads_q, seqlen_q), the accumulator's dtype; null if not wanted
  View residual;  // for the backward pass, see out_residual and lse_residual; null if not wanted

  View mask;  // uint8 (batch, heads_q, seqlen_q, seqlen_k), 1 = attend
  View bias;  // (batch, heads_q, seqlen_q, seqlen_k), dtype bias_dtype
  DType bias_dtype = DType::kFloat32;
  View alibi;  // (batch, heads_q), the accumulator's dtype: stride_b, stride_h
  View sinks;  // (heads_q,), the accumulator's dtype: stride_h

  const int32_t* kv_lengths = nullptr;    // (batch,)
  const int32_t* q_offset = nullptr;      // (batch,): see Sequence; null: see bottom_right
  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1,)
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1,)
  const int32_t* block_table = nullptr;   // (batch, max_pages), contiguous
  int64_t max_pages = 0, page_size = 0, num_pages = 0;

  // Calls with a cache: k and v are the cache, kv_lengths the keys in it before the call.
  int64_t seqlen_new = 0;
  View k_new, v_new;          // (batch, heads_kv, seqlen_new, head_dim or head_dim_v)
  const void* cos = nullptr;  // (positions, rotary_dim / 2), contiguous, the accumulator's dtype
  const void* sin = nullptr;
  int64_t rotary_dim = 0;        // 0 = no rotary embedding
  int64_t rotary_positions = 0;  // rows of cos and sin
  bool rotary_interleaved = false;

  double scale = 1.0;
  double softcap = 0.0;            // 0 = off
  int64_t window_left = -1;        // keys seen to the left of the diagonal; -1 = all
  int64_t window_right = -1;       // likewise to the right; 0 for causal
  bool bottom_right = true;        // without q_offset, the last query stands at the last key; else the first at key 0
  uint32_t dropout_threshold = 0;  // keep iff the Philox word is at least this; 0 = no dropout
  double dropout_scale = 1.0;      // 1 / (1 - p)
  uint64_t seed = 0;

  // Backward only.
  View dout;        // like out
  View dlse;        // like lse; null = zeros
  View dq, dk, dv;  // like q, k, v; null if not wanted. Rows of dk and dv that belong to no key are not written
  View dbias;       // bias's own shape, strides 0 in its broadcast dimensions; the accumulator's dtype
  int64_t dbias_size[4] = {0, 0, 0, 0};
  View dsinks;  // (heads_q,), the accumulator's dtype
};

// In half precision, like out: what rounding took from out, times kResidualScale. For delta. Either residual is inf in
// rows that saw no key; that of the CUDA kernels is not.
FASTATTN_HOST_DEVICE inline View out_residual(const Params& p) {
  return p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16 ? p.residual : View{};
}
// In float32 and float64, like lse: what rounding took from lse, of which large scores leave too few digits after the
// point.
FASTATTN_HOST_DEVICE inline View lse_residual(const Params& p) {
  return p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ? p.residual : View{};
}

// One sequence of a call, dense or varlen: where its rows begin and how many there are. A varlen call has one more than
// its batch: the rows of q behind the last sequence, which see nothing and have no sink.
struct Sequence {
  int64_t q_begin, q_length;  // rows of q and out, from the start of the batch entry
  int64_t k_begin, k_length;  // keys that exist; the rest is never read
  int64_t offset;             // query i stands at position i + offset among the keys
};

FASTATTN_HOST_DEVICE inline int64_t sequences(const Params& p) { return p.batch + (p.cu_seqlens_q != nullptr ? 1 : 0); }

// Index tensors on a GPU are not checked; a wrong one must not lead out of memory.
FASTATTN_HOST_DEVICE inline int64_t bounded(int64_t x, int64_t limit) { return x < 0 ? 0 : x < limit ? x : limit; }

// Where query 0 stands if the call says so, else 0: what dropout adds to the numbers of queries. Within 2^28, so that
// kernels may add it to positions and sides of windows in 32 bits.
FASTATTN_HOST_DEVICE inline int64_t q_offset_of(const Params& p, int64_t b) {
  constexpr int64_t kLargest = int64_t(1) << 28;
  return p.q_offset == nullptr || b >= p.batch ? 0 : bounded(p.q_offset[b] + kLargest, 2 * kLargest) - kLargest;
}

FASTATTN_HOST_DEVICE inline Sequence sequence_of(const Params& p, int64_t b) {
  Sequence s{0, p.seqlen_q, 0, p.seqlen_k, 0};
  if (p.cu_seqlens_q != nullptr) {
    const bool spare = b == p.batch;
    s.q_begin = bounded(p.cu_seqlens_q[b], p.seqlen_q);
    s.q_length = bounded((spare ? p.seqlen_q : bounded(p.cu_seqlens_q[b + 1], p.seqlen_q)) - s.q_begin, p.seqlen_q);
    s.k_begin = bounded(p.cu_seqlens_k[b], p.seqlen_k);
    s.k_length = spare ? 0 : bounded(bounded(p.cu_seqlens_k[b + 1], p.seqlen_k) - s.k_begin, p.seqlen_k);
  }
  if (p.kv_lengths != nullptr && b < p.batch) s.k_length = bounded(p.kv_lengths[b] + p.seqlen_new, s.k_length);
  s.offset = p.q_offset != nullptr ? q_offset_of(p, b) : p.bottom_right ? s.k_length - s.q_length : 0;
  return s;
}

// Keys [first, last) that query i of a sequence may see by length and window; empty if last <= first.
struct KeyRange {
  int64_t first, last;
};

FASTATTN_HOST_DEVICE inline KeyRange visible_keys(const Params& p, const Sequence& s, int64_t i) {
  const int64_t position = i + s.offset;
  KeyRange range{0, s.k_length};
  if (p.window_left >= 0 && position - p.window_left > range.first) range.first = position - p.window_left;
  if (p.window_right >= 0 && position + p.window_right + 1 < range.last) range.last = position + p.window_right + 1;
  return range;
}

}  // namespace fastattn
