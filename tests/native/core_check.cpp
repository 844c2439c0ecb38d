// Runs the whole CPU core, with every instruction set of this processor, on tensors that end where their memory ends.
// The sanitizers watch it (make sanitize): reads and writes out of bounds, undefined behaviour, races between threads.
// Results are compared between 1 and 3 threads, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/instruction_sets.h"
#include "cpu/run.h"

using namespace fastattn;

namespace {

std::mt19937 generator(1);

size_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Memory of exactly the tensor's size; freed at the end of the case.
struct Pool {
  std::vector<void*> blocks;
  ~Pool() {
    for (void* block : blocks) std::free(block);
  }
  void* bytes(size_t n) {
    void* block = std::malloc(n ? n : 1);
    std::memset(block, 0xff, n ? n : 1);  // NaN, until it is written
    blocks.push_back(block);
    return block;
  }
  void* numbers(DType dtype, int64_t n) {
    void* block = bytes(size_t(n) * element_size(dtype));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      const float x = normal(generator);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      switch (dtype) {
        case DType::kFloat32:
          static_cast<float*>(block)[i] = x;
          break;
        case DType::kFloat64:
          static_cast<double*>(block)[i] = x;
          break;
        case DType::kBFloat16:
          static_cast<uint16_t*>(block)[i] = uint16_t(bits >> 16);
          break;
        default:
          static_cast<uint16_t*>(block)[i] = uint16_t(0x3800 + (bits >> 13 & 0x3ff) + (bits >> 31 << 15));
          break;
      }
    }
    return block;
  }
};

struct Sizes {
  int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
};

View dense(void* data, int64_t heads, int64_t seqlen, int64_t dim) {
  return {data, heads * seqlen * dim, seqlen * dim, dim, 1};
}

Params base(Pool& pool, DType dtype, const Sizes& s) {
  Params p;
  p.dtype = dtype;
  p.batch = s.batch, p.heads_q = s.heads_q, p.heads_kv = s.heads_kv;
  p.seqlen_q = s.seqlen_q, p.seqlen_k = s.seqlen_k, p.head_dim = s.head_dim, p.head_dim_v = s.head_dim_v;
  const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  auto tensor = [&](int64_t heads, int64_t seqlen, int64_t dim) {
    return dense(pool.numbers(dtype, s.batch * heads * seqlen * dim), heads, seqlen, dim);
  };
  p.q = tensor(s.heads_q, s.seqlen_q, s.head_dim);
  p.k = tensor(s.heads_kv, s.seqlen_k, s.head_dim);
  p.v = tensor(s.heads_kv, s.seqlen_k, s.head_dim_v);
  p.out = dense(pool.bytes(size_t(s.batch * s.heads_q * s.seqlen_q * s.head_dim_v) * element_size(dtype)), s.heads_q,
                s.seqlen_q, s.head_dim_v);
  p.lse = {pool.bytes(size_t(s.batch * s.heads_q * s.seqlen_q) * element_size(acc)), s.heads_q * s.seqlen_q, s.seqlen_q,
           1, 0};
  p.scale = 1.0 / std::sqrt(double(s.head_dim));
  return p;
}

void add_features(Pool& pool, Params& p, bool broadcast_bias) {
  const DType acc = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t scores = p.batch * p.heads_q * p.seqlen_q * p.seqlen_k;
  uint8_t* mask = static_cast<uint8_t*>(pool.bytes(size_t(scores)));
  for (int64_t i = 0; i < scores; ++i) mask[i] = generator() % 4 != 0;
  p.mask = dense(mask, p.heads_q, p.seqlen_q, p.seqlen_k);
  p.bias_dtype = p.dtype;
  if (broadcast_bias) {
    p.bias = {pool.numbers(p.dtype, p.seqlen_k), 0, 0, 0, 1};
  } else {
    p.bias = dense(pool.numbers(p.dtype, scores), p.heads_q, p.seqlen_q, p.seqlen_k);
  }
  p.alibi = {pool.numbers(acc, p.heads_q), 0, 1, 0, 0};
  p.sinks = {pool.numbers(acc, p.heads_q), 0, 1, 0, 0};
  p.softcap = 5;
  p.window_left = 40;
  p.window_right = 3;
  p.dropout_threshold = 1u << 30;
  p.dropout_scale = 4.0 / 3.0;
  p.seed = 77;
}

void add_gradients(Pool& pool, Params& p, bool broadcast_bias) {
  const DType acc = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  auto like = [&](View view, int64_t n, DType dtype) {
    view.data = pool.bytes(size_t(n) * element_size(dtype));
    return view;
  };
  p.dout = p.out;
  p.dout.data = pool.numbers(p.dtype, p.batch * p.heads_q * p.seqlen_q * p.head_dim_v);
  p.dlse = p.lse;
  p.dlse.data = pool.numbers(acc, p.batch * p.heads_q * p.seqlen_q);
  p.dq = like(p.q, p.batch * p.heads_q * p.seqlen_q * p.head_dim, p.dtype);
  p.dk = like(p.k, p.batch * p.heads_kv * p.seqlen_k * p.head_dim, p.dtype);
  p.dv = like(p.v, p.batch * p.heads_kv * p.seqlen_k * p.head_dim_v, p.dtype);
  if (p.bias.data == nullptr) return;
  const int64_t size[4] = {broadcast_bias ? 1 : p.batch, broadcast_bias ? 1 : p.heads_q,
                           broadcast_bias ? 1 : p.seqlen_q, p.seqlen_k};
  std::memcpy(p.dbias_size, size, sizeof size);
  p.dbias = like(p.bias, size[0] * size[1] * size[2] * size[3], acc);
  p.dsinks = like(p.sinks, p.heads_q, acc);
}

int failures = 0;

void run(const char* name, Params& p, bool gradients) {
  const DType acc = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  struct Output {
    void* data;
    size_t bytes;
  };
  std::vector<Output> outputs = {
      {p.out.data, size_t(p.batch * p.heads_q * p.seqlen_q * p.head_dim_v) * element_size(p.dtype)},
      {p.lse.data, size_t(p.batch * p.heads_q * p.seqlen_q) * element_size(acc)},
  };
  if (gradients) {
    outputs.push_back({p.dq.data, size_t(p.batch * p.heads_q * p.seqlen_q * p.head_dim) * element_size(p.dtype)});
    outputs.push_back({p.dk.data, size_t(p.batch * p.heads_kv * p.seqlen_k * p.head_dim) * element_size(p.dtype)});
    outputs.push_back({p.dv.data, size_t(p.batch * p.heads_kv * p.seqlen_k * p.head_dim_v) * element_size(p.dtype)});
    if (p.dbias.data != nullptr)
      outputs.push_back({p.dbias.data, size_t(p.dbias_size[0] * p.dbias_size[1] * p.dbias_size[2] * p.dbias_size[3]) *
                                           element_size(acc)});
  }
  auto has_nan = [&](const Output& output, DType dtype) {
    if (dtype == DType::kFloat64) {
      const double* x = static_cast<const double*>(output.data);
      return std::any_of(x, x + output.bytes / 8, [](double y) { return y != y; });
    }
    const float* x = static_cast<const float*>(output.data);
    return dtype == DType::kFloat32 && std::any_of(x, x + output.bytes / 4, [](float y) { return y != y; });
  };
  std::vector<std::vector<char>> first;
  for (const int threads : {1, 3}) {
    forward(p, threads);
    if (gradients) backward(p, threads);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i].bytes == 0) {
        first.emplace_back();
        continue;
      }
      if (has_nan(outputs[i], p.dtype)) {
        ++failures;
        std::printf("%s: output %d holds NaN\n", name, int(i));
      }
      const char* data = static_cast<const char*>(outputs[i].data);
      if (threads == 1) {
        first.emplace_back(data, data + outputs[i].bytes);
      } else if (std::memcmp(first[i].data(), data, outputs[i].bytes) != 0) {
        ++failures;
        std::printf("%s: output %d differs between 1 and 3 threads\n", name, int(i));
      }
      if (threads == 1) std::memset(outputs[i].data, 0xff, outputs[i].bytes);
    }
  }
}

void run_cache(DType dtype, int64_t page_size, int64_t seqlen_q) {
  Pool pool;
  const int64_t batch = 2, pages_each = page_size ? (700 + page_size - 1) / page_size : 1,
                slots = page_size ? page_size : 700;
  const DType acc = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Params p = base(pool, dtype, {batch, 4, 2, seqlen_q, 700, 24, 17});
  p.k = dense(pool.numbers(dtype, batch * pages_each * 2 * slots * 24), 2, slots, 24);
  p.v = dense(pool.numbers(dtype, batch * pages_each * 2 * slots * 17), 2, slots, 17);
  if (page_size) {
    int32_t* table = static_cast<int32_t*>(pool.bytes(size_t(batch * pages_each) * 4));
    for (int64_t i = 0; i < batch * pages_each; ++i) table[i] = int32_t(batch * pages_each - 1 - i);
    p.block_table = table;
    p.max_pages = pages_each;
    p.page_size = page_size;
  }
  int32_t* lengths = static_cast<int32_t*>(pool.bytes(8));
  lengths[0] = int32_t(700 - seqlen_q), lengths[1] = 0;
  p.kv_lengths = lengths;
  p.seqlen_new = seqlen_q;
  p.k_new = dense(pool.numbers(dtype, batch * 2 * seqlen_q * 24), 2, seqlen_q, 24);
  p.v_new = dense(pool.numbers(dtype, batch * 2 * seqlen_q * 17), 2, seqlen_q, 17);
  p.rotary_dim = 16;
  p.cos = pool.numbers(acc, 700 * 8);
  p.sin = pool.numbers(acc, 700 * 8);
  p.window_right = 0;
  forward_with_cache(p, 3);
}

}  // namespace

int main() {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  const Sizes sizes[] = {{1, 1, 1, 1, 1, 1, 1},
                         {2, 4, 2, 65, 131, 24, 17},
                         {1, 2, 2, 33, 257, 64, 64},
                         {1, 4, 1, 3, 1100, 33, 40},
                         {1, 1, 1, 5, 0, 8, 8}};
  for (const std::string& isa : instruction_sets()) {
    setenv("FASTATTN_CPU_ISA", isa.c_str(), 1);
    for (const DType dtype : dtypes) {
      for (const Sizes& size : sizes) {
        for (int features = 0; features < 3; ++features) {
          Pool pool;
          Params p = base(pool, dtype, size);
          if (features == 0) p.window_right = 0;
          if (features > 0) add_features(pool, p, features == 2);
          add_gradients(pool, p, features == 2);
          run(isa.c_str(), p, true);
        }
      }
      for (const int64_t left : {1, 2, 7}) {  // most rows stand after the last key and see nothing
        Pool pool;
        Params p = base(pool, dtype, {1, 2, 2, 300, 64, 32, 32});
        p.bottom_right = false;
        p.window_left = left;
        p.window_right = 0;
        add_gradients(pool, p, false);
        run(isa.c_str(), p, true);
      }
      for (const int64_t page_size : {0, 16, 7})
        for (const int64_t seqlen_q : {1, 5, 20}) run_cache(dtype, page_size, seqlen_q);
    }
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
