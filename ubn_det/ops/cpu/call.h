// What the kernels are given: one struct, whose fields each kernel reads or writes as it says.
#pragma once

#include <cstdint>

namespace ubn {

// How kernels for channels last cut the work. It depends on shape and type alone, never on the
// number of threads, and so do all results.
struct Cut {
  int64_t blocks;   // of channels
  int64_t bands;    // of rows, to each sample; a band of one sample is a unit
  int64_t groups;   // of units, one after another, to whom the sums over the batch are handed
  int64_t columns;  // from tile to tile that are done from top to bottom at a time
  int64_t ahead;    // columns, of the tile to ask memory for
  bool streams;     // whether results go past the caches
};

// T is the type of the features; A, float or double, that of all else.
struct Call {
  // Shape of the features, (N, C, H, W), and size k of the neighbourhood, 1 for none.
  int64_t samples, channels, height, width;
  int kernel;

  // Features. Null where a kernel does not touch them.
  const void* x;
  const void* dy;
  void* y;   // T, output of the forward
  void* dx;  // T, output of the backward; null where it is not asked for

  // Parameters, A, (C,) and (C, 1, k, k); null for none. The rectifiers count `gain` times.
  const void *weight, *bias, *center_weight, *scale_weight, *scale_bias, *neighbour_weight;
  double eps, gain;

  // Statistics, A: m (N, C), and mean and var (C,).
  void *m, *mean, *var;
  bool m_is_known;  // in the backward; else it is taken again

  // Condensation score. Null or 0 where there is none.
  double* square_norms;  // (N, C): sum of x^2 over each plane
  double* products;      // (C, N (N - 1) / 2): sum of x_i x_j over each channel, i < j
  int64_t pairs;
  const double* inverse_norms;  // (N,)
  double* squares;              // (C,): sum over a channel of (sum_n x_n inverse_norms[n])^2

  // Backward, A: sums (2, N, C) of dh and of dh (x - m); d_statistics (2, C).
  void *sums, *d_statistics;
  double share;           // one over the number of values in a channel's statistics
  bool has_d_statistics;  // false where statistics are constants
  void *d_weight, *d_bias, *d_center_weight, *d_scale_weight, *d_scale_bias, *d_neighbour_weight;

  // Channels last: the cut of the work, and what its parts leave for the whole.
  Cut cut;
  double* v;            // (2, N, C): variance and mean of each plane; null where not asked for
  double* moments;      // (2, units, C), mean and sum of squared deviations; null for one band
  double* band_sums;    // (2, units, C), as sums; null for one band
  double* group_sums;   // (groups, k k + 5, C): of taps and bias, and ChannelGradients
};

}  // namespace ubn
