// Tile sizes of the kernels for compute capability 7.5. What follows from them is in traits.h.
//
// A row: head_dim, then the configuration without and with score_mod. Two blocks of 4 warps share the 64 KiB and 65536
// registers of a multiprocessor where 2 row tiles per warp fit into registers. Otherwise one block of 8 warps has it to
// itself. 2 row tiles use each fragment of a tile twice: shared memory gives 64 bytes per clock, a fragment in the time
// of two products.
#pragma once

#include "../common/config.h"

namespace fastattn {
namespace cuda {
namespace sm75 {

struct ForwardConfig {
  int row_tiles, warps;
  int block_n;    // as many as shared memory holds
  int q_in_smem;  // fragments for which ptxas finds no room in registers
};

constexpr ConfigRow<ForwardConfig> kForward[] = {
    {64, {2, 4, 48, 0}, {2, 4, 48, 0}},
    {128, {2, 4, 16, 6}, {1, 8, 32, 0}},
};

struct BwdDqConfig {
  int row_tiles, warps;
  int block_n;
};

constexpr ConfigRow<BwdDqConfig> kBwdDq[] = {
    {64, {2, 4, 32}, {1, 8, 32}},
    {128, {1, 8, 32}, {1, 8, 32}},
};

struct BwdDkdvConfig {
  int row_tiles, warps;
  int block_m;
  bool v_in_registers;  // or in shared memory as a whole
  int k_in_smem;        // fragments for which ptxas finds no room in registers
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDkdv[] = {
    {64, {2, 4, 16, false, 2}, {1, 8, 32, true, 0}},
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDk[] = {
    {128, {1, 8, 32, true, 0}, {1, 8, 32, true, 0}},
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDv[] = {
    {128, {1, 8, 32, true, 0}, {1, 8, 32, true, 0}},
};

}  // namespace sm75
}  // namespace cuda
}  // namespace fastattn
