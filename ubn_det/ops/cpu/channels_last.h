// The steps of UBN on features in channels last: how the work is cut, and in which order its
// tasks run.
#pragma once

#include "run.h"

namespace ubn {

// A block of channels has at least this many bytes to each pixel, so that memory is read in runs.
constexpr int64_t LAST_RUN_BYTES = 1 << 10;
// What a walk reads of one row, in all channels of its block, fits the second-level cache several
// times over.
constexpr int64_t LAST_WALK_BYTES = 64 << 10;
// How far ahead, in all channels of a block, memory is asked for.
constexpr int64_t LAST_AHEAD_BYTES = 4 << 10;
// Results of this size go past the caches: they would push out what is still to be read, and be
// gone before the next operator reads them.
constexpr int64_t LAST_STREAM_BYTES = 32 << 20;
// Parts and groups that are enough to keep many threads busy, ...
constexpr int64_t LAST_PARTS = 64;
// ... the size of a part that is worth a task, and one whose sums are still accurate.
constexpr int64_t LAST_PIXELS = 512;
constexpr int64_t LAST_MAX_PIXELS = 8192;
// Channels to a task between the passes over features.
constexpr int64_t LAST_GRAIN = 64;

class ChannelsLastSteps {
 public:
  ChannelsLastSteps(Call& call, at::ScalarType dtype)
      : call_(call),
        tasks_(tasks_of(dtype).last),
        element_size_(c10::elementSize(dtype)),
        kernel_(call.kernel / 2) {
    const auto cover = [](int64_t number, int64_t size) { return (number + size - 1) / size; };
    const int64_t pixels = call.height * call.width, samples = std::max<int64_t>(call.samples, 1);
    Cut& cut = call.cut;
    cut.blocks = std::max<int64_t>(1, call.channels * element_size_ / LAST_RUN_BYTES);
    const int64_t wanted = cover(LAST_PARTS, samples * cut.blocks);
    cut.bands = std::max(std::min(wanted, pixels / LAST_PIXELS), pixels / LAST_MAX_PIXELS);
    cut.bands = std::max<int64_t>(1, std::min(cut.bands, call.height / 4));
    units_ = call.samples * cut.bands;
    cut.groups = std::clamp<int64_t>(cover(LAST_PARTS, cut.blocks), 1, std::max<int64_t>(units_, 1));
    const int64_t bytes = cover(call.channels, cut.blocks) * element_size_;
    cut.columns = std::max<int64_t>(16, LAST_WALK_BYTES / std::max<int64_t>(bytes, 1) / 4 * 4);
    cut.ahead = std::max<int64_t>(4, LAST_AHEAD_BYTES / std::max<int64_t>(bytes, 1) / 4 * 4);
    const int64_t row = call.channels * element_size_;
    const void* out = call.y ? call.y : call.dx;
    cut.streams = call.samples * pixels * row >= LAST_STREAM_BYTES && row % 64 == 0 &&
        reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }

  // m, and v, mean and var where they are asked for.
  void moments(bool has_statistics) {
    if (has_statistics) {
      v_.resize(2 * call_.samples * call_.channels);
      call_.v = v_.data();
    }
    reserve_moments();
    run_on_parts(tasks_.moments);
    if (call_.moments) run_on_channels(tasks_.merge_bands);
    if (has_statistics) run_on_channels(tasks_.statistics);
  }

  // The products of the samples, in chunks of their values.
  void multiply_samples() {
    const int64_t size = call_.channels * call_.height * call_.width;
    run(tasks_.multiply_samples, call_, (size + LAST_CHUNK - 1) / LAST_CHUNK, 0, 0);
  }

  void normalize() { run_on_parts(tasks_.normalize[kernel_]); }

  // m, where y depends on it, and y.
  void evaluate() {
    if (!call_.center_weight && !call_.scale_weight) {
      normalize();
    } else if (call_.cut.bands == 1) {
      run_on_parts(tasks_.evaluate[kernel_]);
    } else {
      moments(false);
      normalize();
    }
  }

  // sums, d_statistics and the gradients of parameters but center_weight; m where it is not known.
  void reduce() {
    if (!call_.m_is_known) moments(false);
    const int64_t taps = call_.kernel * call_.kernel;
    std::vector<double> group_sums(call_.cut.groups * (taps + 5) * call_.channels);
    call_.group_sums = group_sums.data();
    std::vector<double> band_sums(call_.cut.bands > 1 ? 2 * units_ * call_.channels : 0);
    call_.band_sums = call_.cut.bands > 1 ? band_sums.data() : nullptr;
    if (units_)
      run(tasks_.reduce[kernel_], call_, call_.cut.groups * call_.cut.blocks, 0, memory());
    run_on_channels(tasks_.write_gradients[kernel_]);
  }

  // dx and the gradient of center_weight, where they are asked for.
  void input_gradient() {
    if (call_.d_center_weight) run_on_channels(tasks_.write_center_gradient[kernel_]);
    if (call_.dx) run_on_parts(tasks_.input_gradient[kernel_]);
  }

 private:
  void reserve_moments() {
    if (call_.cut.bands == 1) return;
    moments_.resize(2 * units_ * call_.channels);
    call_.moments = moments_.data();
  }

  void run_on_parts(Task task) { run(task, call_, units_ * call_.cut.blocks, 0, memory()); }

  void run_on_channels(Task task) { run(task, call_, call_.channels, LAST_GRAIN, 0); }

  // Bytes that a task on parts needs, in any instruction set.
  int64_t memory() const {
    const int64_t k = call_.kernel, blocks = call_.cut.blocks;
    const int64_t channels = (call_.channels + blocks - 1) / blocks + 64 + 16;
    return channels * (4 * k * k + k + 20) * int64_t(sizeof(double)) + 8 * 64;
  }

  Call& call_;
  const LastTasks& tasks_;
  const int64_t element_size_;
  const int kernel_;
  int64_t units_;
  std::vector<double> v_, moments_;
};

}  // namespace ubn
