// The kernels of one instruction set, and how much memory one task of theirs needs.
#pragma once

#include "call.h"

namespace ubn {

enum class Type { float32, float64, bfloat16, float16 };
constexpr int NUM_TYPES = 4;
constexpr int NUM_KERNELS = 3;  // 1, 3 and 5

// A task on the channels [begin, end), or, of evaluate where planes are not small, on the planes.
// Memory of a task is aligned to 64 bytes and holds anything.
using Task = void (*)(const Call&, int64_t begin, int64_t end, void* memory);

struct Tasks {
  Task moments;
  Task normalize[NUM_KERNELS], train[NUM_KERNELS], evaluate[NUM_KERNELS];
  Task reduce[NUM_KERNELS], input_gradient[NUM_KERNELS], backward[NUM_KERNELS];
};

// The same for channels last, as channels_last.inc has them: some on parts of the work, the others
// on channels, once all parts are done.
struct LastTasks {
  Task moments, merge_bands, statistics, multiply_samples;
  Task normalize[NUM_KERNELS], evaluate[NUM_KERNELS];
  Task reduce[NUM_KERNELS], write_gradients[NUM_KERNELS];
  Task input_gradient[NUM_KERNELS], write_center_gradient[NUM_KERNELS];
};

// All tasks for features of one type.
struct TypeTasks {
  Tasks first, small;
  LastTasks last;
  Task weigh_samples;
};

// By Type. Those for float64, where speed matters least, exist in the baseline alone.
extern const TypeTasks baseline_tasks[NUM_TYPES];
#if UBN_X86
extern const TypeTasks avx2_tasks[NUM_TYPES];
extern const TypeTasks avx512_tasks[NUM_TYPES];
#endif

// Values of each sample whose products are taken at a time, in channels last.
constexpr int64_t LAST_CHUNK = 4096;

// What a band of rows takes at most where a row is not longer.
constexpr int64_t BAND_BYTES = 28 << 10;

// Larger planes than this the processor reads ahead by itself.
constexpr int64_t PREFETCHED_BYTES = 2 << 10;

// Planes of no more values have kernels of their own, which take this many channels at a time.
constexpr int64_t SMALL_PLANE = 64;
constexpr int64_t SMALL_CHANNELS = 16;

// Bytes that a task on `channels` channels needs, in any instruction set.
inline int64_t memory_of(const Call& call, int64_t channels) {
  const int64_t taps = call.kernel * call.kernel, halo = call.kernel - 1;
  const int64_t planes = call.samples * channels * 6 * int64_t(sizeof(double));
  const int64_t parameters = channels * (taps + 16) * int64_t(sizeof(double));
  const int64_t sums = channels * (taps + 1) * 144;
  const int64_t row = (call.width + halo + 32) * int64_t(sizeof(double));
  const int64_t band = BAND_BYTES + (4 + halo) * row;
  const int64_t weighed = channels * call.height * call.width * int64_t(sizeof(double));
  const int64_t needed = planes + parameters + sums + band + 8 * 64;
  const int64_t tile = ((call.height + halo) * (call.width + halo) + 8) * 64;
  const int64_t tiles = call.height * call.width <= SMALL_PLANE ? 3 * tile : 0;
  const int64_t more = needed > weighed ? needed : weighed;
  return more > tiles ? more : tiles;
}

}  // namespace ubn
