// Panels: the query rows that one step of a kernel works on, one row per vector lane.
//
// The heads of a group share a key/value head, so they are simply more rows of it: row r of a sequence and key/value
// head stands for query r / group in head head_kv * group + r % group. K and V are then read once for the whole group.
#pragma once

#include "../../call/params.h"
#include "gemm.h"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V>
struct Panel {
  static constexpr int kLanes = kLanesOf<V>;
  int count;    // rows; the lanes behind them see nothing and are never written
  int vectors;  // 1 or 2: vectors that hold them
  int64_t b;
  int64_t query[kLanes], head[kLanes];
  KeyRange keys[kLanes];  // what length and window let the row see
  KeyRange any;           // the union of these, and
  KeyRange all;           // their intersection: no step inside it needs to look at the ranges
};

// The heads that share a panel: row r stands for query r / count in head first + r % count.
struct HeadGroup {
  int64_t first, count;
};

inline HeadGroup group_of(const Params& p, int64_t head_kv) {
  const int64_t count = p.heads_q / p.heads_kv;
  return {head_kv * count, count};
}

template <class V>
void set_panel(Panel<V>& panel, const Params& p, const Sequence& seq, int64_t b, HeadGroup heads, int64_t first_row,
               int64_t rows, KeyRange limit) {
  panel.count = int(smaller(rows, Panel<V>::kLanes));
  panel.vectors = panel.count > V::kWidth ? 2 : 1;
  panel.b = b;
  panel.any = {limit.last, limit.first};
  panel.all = limit;
  int64_t i = first_row / heads.count, head = first_row % heads.count;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    if (lane >= panel.count) {
      panel.query[lane] = panel.head[lane] = 0;
      panel.keys[lane] = {0, 0};
      continue;
    }
    panel.query[lane] = i;
    panel.head[lane] = heads.first + head;
    KeyRange range = visible_keys(p, seq, i);
    range = {larger(range.first, limit.first), smaller(range.last, limit.last)};
    panel.keys[lane] = range;
    if (range.first < range.last) {
      panel.any = {smaller(panel.any.first, range.first), larger(panel.any.last, range.last)};
    }
    panel.all = {larger(panel.all.first, range.first), smaller(panel.all.last, range.last)};
    if (++head == heads.count) {
      head = 0;
      ++i;
    }
  }
}

// The first element of a query row of q, out or a gradient of theirs.
template <class T>
T* row_of(const View& view, const Sequence& seq, int64_t b, int64_t head, int64_t query) {
  return static_cast<T*>(view.data) + b * view.stride_b + head * view.stride_h + (seq.q_begin + query) * view.stride_s;
}

// The first element of key j's row in k, v or a gradient of theirs, through the block table if there is one.
template <class T>
T* key_row(const Params& p, const View& view, const Sequence& seq, int64_t b, int64_t head_kv, int64_t j) {
  T* data = static_cast<T*>(view.data) + head_kv * view.stride_h;
  if (p.block_table == nullptr) return data + b * view.stride_b + (seq.k_begin + j) * view.stride_s;
  return data + int64_t(p.block_table[b * p.max_pages + j / p.page_size]) * view.stride_b +
         j % p.page_size * view.stride_s;
}

// Asks for a row that will be read soon. Keys and values come in turns, a block of each: without this the memory would
// rest while the processor computes, and the processor wait whenever it changes from one to the other.
template <class T>
inline void prefetch_row(const T* row, int dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < int64_t(dim) * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
