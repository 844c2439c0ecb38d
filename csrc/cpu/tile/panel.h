// Panels: the query rows that one step of a kernel works on, one row per vector lane.
//
// The heads of a group share a key/value head, so they are simply more rows of it: row r of a sequence and key/value
// head stands for query r / group in head head_kv * group + r % group. K and V are then read once for the whole group.
#pragma once

#include "gemm.h"
#include "integers.h"
#include "rows.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class V>
struct Panel {
  static constexpr int kLanes = kLanesOf<V>;
  int count;    // rows; the lanes after them see nothing and are never written
  int vectors;  // 1 or 2: vectors that hold them
  int64_t b;
  int64_t query[kLanes], head[kLanes];
  int lanes() const { return vectors * V::kWidth; }
};

// The heads that share a panel: row r stands for query r / count in head first + r % count.
struct HeadGroup {
  int64_t first, count;
};

inline HeadGroup group_of(const Params& p, int64_t head_kv) {
  const int64_t count = p.heads_q / p.heads_kv;
  return {head_kv * count, count};
}

// The first of `rows` rows from first_row on, as many as fit.
template <class V>
void set_rows(Panel<V>& panel, int64_t b, HeadGroup heads, int64_t first_row, int64_t rows) {
  panel.count = int(smaller(rows, Panel<V>::kLanes));
  panel.vectors = panel.count > V::kWidth ? 2 : 1;
  panel.b = b;
  int64_t query = first_row / heads.count, head = first_row % heads.count;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    if (lane >= panel.count) {
      panel.query[lane] = panel.head[lane] = 0;
      continue;
    }
    panel.query[lane] = query;
    panel.head[lane] = heads.first + head;
    if (++head == heads.count) {
      head = 0;
      ++query;
    }
  }
}

// The first element of a lane's row in q, out or a gradient of theirs.
template <class T, class V>
T* panel_row(const View& view, const Sequence& seq, const Panel<V>& panel, int lane) {
  return row_of<T>(view, seq, panel.b, panel.head[lane], panel.query[lane]);
}

// Where the rows begin in a (batch, heads_q, seqlen_q, seqlen_k) view: at[lane]; lanes without a row repeat the first.
// Returns whether it is the same place for all.
template <class V>
bool row_offsets(const Panel<V>& panel, const View& view, int64_t* at) {
  bool same = true;
  for (int lane = 0; lane < Panel<V>::kLanes; ++lane) {
    at[lane] = panel.b * view.stride_b + panel.head[lane] * view.stride_h + panel.query[lane] * view.stride_s;
    if (lane >= panel.count) at[lane] = at[0];
    same = same && at[lane] == at[0];
  }
  return same;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
