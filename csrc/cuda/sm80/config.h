// Tile sizes of the kernels for compute capability 8.0 and up. What follows from them is in traits.h.
//
// A row: head_dim, then the configuration without and with score_mod.
//   row_tiles  of 16 rows, per warp: 2 use each fragment of a tile twice, where the registers hold 2
//   warps      two blocks of 4 warps share the registers of a multiprocessor, or one of 8 warps has them
//   in_smem    fragments of an operand kept in shared memory, for which ptxas finds no room in registers. The numbers
//              were found by trying, see CONTRIBUTING.md.
#pragma once

#include "../common/config.h"

namespace fastattn {
namespace cuda {
namespace sm80 {

struct ForwardConfig {
  int row_tiles, warps;
  int block_n;
  int q_in_smem, q_in_smem_sm90;  // fragments; the latter where Arch::kShortOfRegisters
};

constexpr ConfigRow<ForwardConfig> kForward[] = {
    {32, {2, 4, 64, 0, 1}, {2, 4, 64, 2, 2}},  {64, {2, 4, 64, 0, 0}, {2, 4, 64, 0, 0}},
    {96, {2, 4, 32, 0, 0}, {2, 4, 32, 0, 0}},  {128, {2, 4, 32, 0, 7}, {1, 8, 32, 0, 0}},
    {192, {1, 8, 32, 0, 0}, {1, 8, 32, 0, 0}}, {256, {1, 8, 32, 0, 0}, {1, 8, 32, 0, 0}},
};

struct BwdDqConfig {
  int row_tiles, warps;
  int block_n;          // at least the rows that all threads copy at once
  bool q_in_registers;  // or in shared memory as a whole
  int dout_in_smem;     // fragments
};

constexpr ConfigRow<BwdDqConfig> kBwdDq[] = {
    {32, {2, 4, 32, true, 0}, {1, 8, 64, true, 0}},    {64, {2, 4, 32, true, 0}, {1, 8, 32, true, 0}},
    {96, {1, 8, 64, true, 0}, {1, 8, 64, true, 0}},    {128, {1, 8, 32, true, 0}, {1, 8, 32, true, 0}},
    {192, {1, 8, 32, false, 0}, {1, 8, 32, false, 0}}, {256, {1, 4, 16, false, 3}, {1, 4, 16, false, 3}},
};

struct BwdDkdvConfig {
  int row_tiles, warps;
  int block_m;                          // at least the rows that all threads copy at once
  bool k_in_registers, v_in_registers;  // or in shared memory as a whole
  int k_in_smem_sm90;                   // fragments where Arch::kShortOfRegisters
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDkdv[] = {
    {32, {2, 4, 64, true, true, 1}, {1, 8, 64, true, true, 0}},
    {64, {2, 4, 64, true, false, 8}, {1, 8, 64, true, true, 0}},
    {96, {1, 8, 64, true, true, 0}, {1, 8, 64, true, true, 0}},
    {128, {1, 8, 32, true, true, 2}, {1, 8, 32, true, false, 0}},
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDk[] = {
    {192, {1, 4, 16, true, true, 0}, {1, 4, 16, true, true, 2}},
    {256, {1, 4, 16, true, false, 1}, {1, 4, 16, false, false, 0}},
};

constexpr ConfigRow<BwdDkdvConfig> kBwdDv[] = {
    {192, {1, 4, 16, true, true, 0}, {1, 4, 16, true, true, 2}},
    {256, {1, 4, 16, true, false, 1}, {1, 4, 16, true, false, 0}},
};

struct DecodeConfig {
  int warps, stages;
};

// As many stages as fit into 96 KiB, for bytes under way: see decode.h.
constexpr ConfigRow<DecodeConfig> kDecode[] = {
    {32, {4, 5}, {4, 5}},  {64, {4, 3}, {4, 3}},  {96, {4, 3}, {4, 3}},
    {128, {4, 3}, {4, 3}}, {192, {2, 4}, {2, 4}}, {256, {2, 3}, {2, 3}},
};

}  // namespace sm80
}  // namespace cuda
}  // namespace fastattn
