// The steps of UBN on CPU tensors: checks, allocation, and the kernels' tasks in parallel.

#include <torch/extension.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "channels_last.h"
#include "run.h"

namespace ubn {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
// weight, bias, center_weight, scale_weight, scale_bias, neighbour_weight.
using Parameters = std::array<Optional, 6>;

// Pairwise products read the batch N - 1 times, the sum of unit vectors reads it once more.
constexpr int64_t MAX_PAIRWISE = 4;

// A task's part of one sample is at least this long, so that memory is read in runs, ...
constexpr int64_t RUN_BYTES = 2 << 10;
// ... unless its part of all samples would not fit the second-level cache.
constexpr int64_t TASK_BYTES = 8 << 20;

// Whether contiguous features have planes so small that lanes are better channels.
bool is_small(const Call& call) {
  return call.height * call.width <= SMALL_PLANE && call.channels >= SMALL_CHANNELS / 2 &&
      call.kernel < 5;
}

void run_on_channels(Task task, const Call& call, int64_t bytes_a_value) {
  const int64_t plane = call.height * call.width * bytes_a_value;
  const int64_t long_enough = (RUN_BYTES + plane - 1) / plane;
  const int64_t fitting = TASK_BYTES / (plane * call.samples);
  int64_t block = std::clamp<int64_t>(std::min(long_enough, fitting), 1, call.channels);
  if (is_small(call)) block = SMALL_CHANNELS;
  run(task, call, call.channels, block, memory_of(call, block));
}

const Tasks& tasks_for(const Call& call, const Tensor& x) {
  const TypeTasks& tasks = tasks_of(x.scalar_type());
  return is_small(call) ? tasks.small : tasks.first;
}

// Whether features are in channels last. Maps of one pixel are; all else that is both is taken for
// contiguous.
bool is_last(const Tensor& x) {
  if (x.is_contiguous()) return x.size(2) * x.size(3) == 1;
  return x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A parameter, a statistic or a sum that goes with features x.
void check(const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK(
      tensor.device() == x.device(),
      "UBN: the input is on ", x.device(), " and the layer on ", tensor.device(),
      ": move one of them");
  TORCH_CHECK(
      tensor.is_contiguous() && tensor.scalar_type() == accumulate_type(x),
      "UBN: a tensor has to be contiguous and of type ", accumulate_type(x));
}

void check_size(const Tensor& tensor, int64_t channels) {
  TORCH_CHECK(
      tensor.numel() == channels,
      "UBN: a parameter or a statistic has ", tensor.numel(), " values for an input of ", channels,
      " channels");
}

const void* pointer(const Optional& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

Call call_of(const Tensor& x, const Parameters& parameters, double eps, double gain) {
  TORCH_CHECK(
      x.is_contiguous() || is_last(x), "UBN: the input has to be contiguous or in channels last");
  Call call{};
  call.samples = x.size(0);
  call.channels = x.size(1);
  call.height = x.size(2);
  call.width = x.size(3);
  call.x = x.const_data_ptr();
  const auto& [weight, bias, center_weight, scale_weight, scale_bias, neighbour_weight] =
      parameters;
  call.kernel = neighbour_weight.has_value() ? neighbour_weight->size(-1) : 1;
  call.weight = pointer(weight);
  call.bias = pointer(bias);
  call.center_weight = pointer(center_weight);
  call.scale_weight = pointer(scale_weight);
  call.scale_bias = pointer(scale_bias);
  call.neighbour_weight = pointer(neighbour_weight);
  call.eps = eps;
  call.gain = gain;
  for (const auto& parameter : parameters)
    if (parameter.has_value()) check(*parameter, x);
  if (neighbour_weight.has_value())
    TORCH_CHECK(
        neighbour_weight->dim() == 4 && neighbour_weight->size(0) == call.channels &&
            neighbour_weight->size(1) == 1 && neighbour_weight->size(2) == call.kernel &&
            (call.kernel == 1 || call.kernel == 3 || call.kernel == 5),
        "UBN: neighbour_weight has to be of shape (C, 1, k, k), k 1, 3 or 5, for an input of ",
        call.channels, " channels, got ", neighbour_weight->sizes());
  for (size_t i = 0; i + 1 < parameters.size(); ++i)
    if (parameters[i].has_value()) check_size(*parameters[i], call.channels);
  return call;
}

Tensor new_sums(const Tensor& x, at::IntArrayRef sizes) {
  return at::empty(sizes, x.options().dtype(accumulate_type(x)).memory_format(at::MemoryFormat::Contiguous));
}

int kernel_index(const Call& call) { return call.kernel / 2; }

// The same features in channels last, read as contiguous ones: each pixel a channel, whose plane
// is what its channels are.
Call as_pixels(Call call) {
  const int64_t pixels = call.height * call.width;
  call.height = 1;
  call.width = call.channels;
  call.channels = pixels;
  return call;
}

// How many numbers make up the product of two samples.
int64_t product_rows(const Call& call, const Tensor& x) {
  const int64_t size = call.channels * call.height * call.width;
  return is_last(x) ? (size + LAST_CHUNK - 1) / LAST_CHUNK : call.channels;
}

// Fills the last three numbers of summary.
template <class A>
void write_counts(A* numbers, double count, double pair_sum, double num_pairs) {
  numbers[0] = static_cast<A>(count);
  numbers[1] = static_cast<A>(pair_sum);
  numbers[2] = static_cast<A>(num_pairs);
}

// Takes m and the statistics and, where call has room for it, y; returns m and summary. What the
// score is made of is taken on the way.
std::tuple<Tensor, Tensor> describe(Call& call, const Tensor& x, bool is_scored) {
  const int64_t num = call.samples, channels = call.channels;
  Tensor m = new_sums(x, {num, channels});
  Tensor summary = new_sums(x, {2 * channels + 3});
  call.m = m.data_ptr();
  call.mean = summary.data_ptr();
  call.var = static_cast<char*>(summary.data_ptr()) + channels * summary.element_size();
  is_scored = is_scored && num > 1;
  std::vector<double> square_norms(is_scored ? num * channels : 0);
  std::vector<double> products;
  if (is_scored) {
    call.square_norms = square_norms.data();
    if (num <= MAX_PAIRWISE) {
      call.pairs = num * (num - 1) / 2;
      products.resize(product_rows(call, x) * call.pairs);
      call.products = products.data();
    }
  }
  if (is_last(x)) {
    ChannelsLastSteps steps(call, x.scalar_type());
    steps.moments(true);
    if (call.products) steps.multiply_samples();
    if (call.y) steps.normalize();
  } else {
    const Tasks& tasks = tasks_for(call, x);
    run_on_channels(
        call.y ? tasks.train[kernel_index(call)] : tasks.moments, call, x.element_size());
  }

  double pair_sum = 0;
  if (is_scored) {
    std::vector<double> inverse_norms(num);
    int64_t nonzero = 0;
    for (int64_t n = 0; n < num; ++n) {
      double square = 0;
      for (int64_t c = 0; c < channels; ++c) square += square_norms[n * channels + c];
      inverse_norms[n] = square == 0 ? 0 : 1 / std::sqrt(square);
      nonzero += square != 0;
    }
    if (call.products) {
      int64_t pair = 0;
      for (int64_t i = 0; i < num; ++i)
        for (int64_t j = i + 1; j < num; ++j, ++pair) {
          double product = 0;
          for (size_t k = pair; k < products.size(); k += call.pairs) product += products[k];
          pair_sum += 2 * product * inverse_norms[i] * inverse_norms[j];
        }
    } else {
      Call flat = is_last(x) ? as_pixels(call) : call;
      std::vector<double> squares(flat.channels);
      flat.inverse_norms = inverse_norms.data();
      flat.squares = squares.data();
      run_on_channels(tasks_of(x.scalar_type()).weigh_samples, flat, x.element_size());
      for (const double square : squares) pair_sum += square;
      pair_sum -= nonzero;
    }
  }
  const double count = double(num) * call.height * call.width;
  const double num_pairs = is_scored ? double(num) * (num - 1) : 0;
  if (summary.scalar_type() == at::kDouble) {
    write_counts(summary.data_ptr<double>() + 2 * channels, count, pair_sum, num_pairs);
  } else {
    write_counts(summary.data_ptr<float>() + 2 * channels, count, pair_sum, num_pairs);
  }
  return {m, summary};
}

std::tuple<Tensor, Tensor> moments(
    const Tensor& x, const Optional& center_weight, double gain, bool is_scored) {
  Call call = call_of(x, {std::nullopt, std::nullopt, center_weight}, 0, gain);
  return describe(call, x, is_scored);
}

std::tuple<Tensor, Tensor, Tensor> train(
    const Tensor& x, const Parameters& parameters, double eps, double gain, bool is_scored) {
  Call call = call_of(x, parameters, eps, gain);
  Tensor y = at::empty_like(x);
  call.y = y.data_ptr();
  auto [m, summary] = describe(call, x, is_scored);
  return {y, m, summary};
}

void set_statistics(Call& call, const Tensor& x, const Tensor& mean, const Tensor& var) {
  check(mean, x);
  check(var, x);
  check_size(mean, call.channels);
  check_size(var, call.channels);
  call.mean = mean.data_ptr();
  call.var = var.data_ptr();
}

Tensor normalize(
    const Tensor& x,
    const Tensor& m,
    const Tensor& mean,
    const Tensor& var,
    const Parameters& parameters,
    double eps,
    double gain) {
  Call call = call_of(x, parameters, eps, gain);
  set_statistics(call, x, mean, var);
  Tensor y = at::empty_like(x);
  call.m = m.data_ptr();
  call.y = y.data_ptr();
  if (is_last(x)) {
    ChannelsLastSteps(call, x.scalar_type()).normalize();
  } else {
    run_on_channels(tasks_for(call, x).normalize[kernel_index(call)], call, x.element_size());
  }
  return y;
}

Tensor evaluate(
    const Tensor& x,
    const Tensor& mean,
    const Tensor& var,
    const Parameters& parameters,
    double eps,
    double gain) {
  Call call = call_of(x, parameters, eps, gain);
  set_statistics(call, x, mean, var);
  Tensor y = at::empty_like(x);
  call.y = y.data_ptr();
  if (is_last(x)) {
    // Where nothing depends on the instance mean, any value will do.
    const Tensor m = mean.repeat({call.samples, 1});
    call.m = m.data_ptr();
    ChannelsLastSteps(call, x.scalar_type()).evaluate();
    return y;
  }
  const Task task = tasks_for(call, x).evaluate[kernel_index(call)];
  if (is_small(call)) {
    run_on_channels(task, call, x.element_size());
  } else {
    const int64_t plane = call.height * call.width * x.element_size();
    const int64_t grain = std::max<int64_t>(1, (32 << 10) / plane);
    run(task, call, call.samples * call.channels, grain, memory_of(call, 1));
  }
  return y;
}

// What the backward pass returns: gradients of the parameters, in their order.
using Gradients = std::array<Optional, 6>;

Gradients new_gradients(const Parameters& parameters, Call& call) {
  Gradients gradients;
  void** const places[] = {
      &call.d_weight,
      &call.d_bias,
      &call.d_center_weight,
      &call.d_scale_weight,
      &call.d_scale_bias,
      &call.d_neighbour_weight};
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].has_value()) {
      gradients[i] = at::empty_like(*parameters[i]);
      *places[i] = gradients[i]->data_ptr();
    }
  return gradients;
}

void set_output_gradient(Call& call, const Tensor& dy, const Tensor& x) {
  TORCH_CHECK(
      dy.sizes() == x.sizes() && dy.scalar_type() == x.scalar_type() &&
          (is_last(x) ? is_last(dy) : dy.is_contiguous()),
      "UBN: the output's gradient has to have the input's shape, type and memory format");
  call.dy = dy.const_data_ptr();
}

// m, given or taken again, and the sums of every plane.
std::tuple<Tensor, Tensor, Tensor> set_backward(
    Call& call, const Tensor& dy, const Tensor& x, const Optional& m) {
  Tensor kept = m.has_value() ? *m : new_sums(x, {call.samples, call.channels});
  Tensor sums = new_sums(x, {2, call.samples, call.channels});
  Tensor d_statistics = new_sums(x, {2, call.channels});
  set_output_gradient(call, dy, x);
  call.m = kept.data_ptr();
  call.m_is_known = m.has_value();
  call.sums = sums.data_ptr();
  call.d_statistics = d_statistics.data_ptr();
  return {kept, sums, d_statistics};
}

// m, sums, d_statistics, and the gradients of all parameters but center_weight, in their order.
std::tuple<Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional, Optional> reduce(
    const Tensor& dy,
    const Tensor& x,
    const Optional& m,
    const Tensor& mean,
    const Tensor& var,
    const Parameters& parameters,
    double eps,
    double gain) {
  Call call = call_of(x, parameters, eps, gain);
  set_statistics(call, x, mean, var);
  auto [kept, sums, d_statistics] = set_backward(call, dy, x, m);
  Gradients gradients = new_gradients(parameters, call);
  if (is_last(x)) {
    ChannelsLastSteps(call, x.scalar_type()).reduce();
  } else {
    run_on_channels(tasks_for(call, x).reduce[kernel_index(call)], call, 2 * x.element_size());
  }
  const auto& g = gradients;
  return {kept, sums, d_statistics, g[0], g[1], g[3], g[4], g[5]};
}

std::tuple<Tensor, Optional> input_gradient(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& m,
    const Tensor& mean,
    const Tensor& var,
    const Parameters& parameters,
    const Tensor& sums,
    const Optional& d_statistics,
    double share,
    double eps,
    double gain) {
  Call call = call_of(x, parameters, eps, gain);
  set_statistics(call, x, mean, var);
  set_output_gradient(call, dy, x);
  call.m = m.data_ptr();
  call.m_is_known = true;
  call.sums = sums.data_ptr();
  call.has_d_statistics = d_statistics.has_value();
  if (d_statistics.has_value()) call.d_statistics = d_statistics->data_ptr();
  call.share = share;
  Tensor dx = at::empty_like(x);
  call.dx = dx.data_ptr();
  Optional d_center_weight;
  if (parameters[2].has_value()) {
    d_center_weight = at::empty_like(*parameters[2]);
    call.d_center_weight = d_center_weight->data_ptr();
  }
  if (is_last(x)) {
    ChannelsLastSteps(call, x.scalar_type()).input_gradient();
  } else {
    run_on_channels(tasks_for(call, x).input_gradient[kernel_index(call)], call, 2 * x.element_size());
  }
  return {dx, d_center_weight};
}

// Without has_input_gradient dx has no values.
std::tuple<Tensor, Gradients> backward(
    const Tensor& dy,
    const Tensor& x,
    const Optional& m,
    const Tensor& mean,
    const Tensor& var,
    const Parameters& parameters,
    bool has_batch_statistics,
    bool has_input_gradient,
    double eps,
    double gain) {
  Call call = call_of(x, parameters, eps, gain);
  set_statistics(call, x, mean, var);
  auto [kept, sums, d_statistics] = set_backward(call, dy, x, m);
  Gradients gradients = new_gradients(parameters, call);
  call.has_d_statistics = has_batch_statistics;
  call.share = 1 / (double(call.samples) * call.height * call.width);
  Tensor dx = has_input_gradient ? at::empty_like(x) : at::empty({0}, x.options());
  call.dx = has_input_gradient ? dx.data_ptr() : nullptr;
  if (is_last(x)) {
    ChannelsLastSteps steps(call, x.scalar_type());
    steps.reduce();
    steps.input_gradient();
  } else {
    run_on_channels(tasks_for(call, x).backward[kernel_index(call)], call, 2 * x.element_size());
  }
  return {dx, gradients};
}

// running = (1 - factor) running + factor new, in double.
template <class A>
void move(Tensor& running, const A* values, double factor, double correction) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, running.scalar_type(), "update", [&] {
        // A user may have put in a column of a larger tensor.
        const Tensor dense = running.contiguous();
        scalar_t* p = dense.data_ptr<scalar_t>();
        for (int64_t c = 0; c < running.numel(); ++c)
          p[c] = static_cast<scalar_t>(
              (1 - factor) * static_cast<double>(p[c]) + factor * (values[c] * correction));
        if (!dense.is_same(running)) running.copy_(dense);
      });
}

// The threshold that follows the scores.
template <class S>
S limit_of(S mean, S var, S z, S margin) {
  return mean + z * std::sqrt(var) + margin;
}

template <class A>
void update_from(
    std::array<Tensor, 10>& buffers,
    const A* summary,
    int64_t channels,
    std::optional<double> momentum,
    std::optional<double> threshold,
    int64_t warmup,
    int64_t patience,
    std::optional<double> z,
    double weight) {
  auto& [running_mean, running_var, tracked, condensation, condensed, readmitted, consecutive,
         score_mean, score_var, scored] = buffers;
  const auto count_of = [](Tensor& t) -> int64_t& { return *t.data_ptr<int64_t>(); };
  const double count = summary[2 * channels], pair_sum = summary[2 * channels + 1],
               num_pairs = summary[2 * channels + 2];
  if (count == 0) return;

  // A NaN or an infinity in any channel survives the sum.
  double total = 0;
  for (int64_t i = 0; i < 2 * channels; ++i) total += summary[i];
  bool is_open = std::isfinite(total) && count > 1;
  // Whether the row of closed batches ends with this one, if it is open.
  bool is_end = !z.has_value();
  if (threshold.has_value() && num_pairs > 0) {
    // Rounding may lift the score of equal samples over 1.
    const A score = std::clamp<A>(static_cast<A>(pair_sum / num_pairs), -1, 1);
    if (std::isfinite(score)) {
      // Of any type: a layer may be cast as a whole.
      condensation.fill_(score);
      bool is_over = momentum.has_value() && count_of(tracked) >= warmup;
      double mean = 0, var = 0;
      if (z.has_value()) {
        mean = score_mean.item<double>();
        var = score_var.item<double>();
        // Rounded as gate.py does it.
        const bool is_double = score_mean.scalar_type() == at::kDouble;
        const double limit = is_double ? limit_of<double>(mean, var, *z, *threshold)
                                       : limit_of<float>(mean, var, *z, *threshold);
        is_over = is_over && count_of(scored) >= warmup && score > limit;
        is_end = !is_over;
      } else {
        is_over = is_over && score > static_cast<A>(*threshold);
      }
      if (is_over && is_open) {
        is_open = count_of(consecutive) >= patience;
        count_of(readmitted) += is_open;
      }
      if (z.has_value() && is_open) {
        const double share = std::max(1.0 / ++count_of(scored), weight), distance = score - mean;
        score_mean.fill_(mean + share * distance);
        score_var.fill_((1 - share) * (var + share * distance * distance));
      }
    }
  }
  if (!is_open) {
    ++count_of(condensed);
    ++count_of(consecutive);
    return;
  }
  ++count_of(tracked);
  if (is_end) count_of(consecutive) = 0;
  const double factor = momentum.value_or(1.0 / count_of(tracked));
  move(running_mean, summary, factor, 1);
  move(running_var, summary + channels, factor, count / (count - 1));
}

// The gate, as gate.py has it in operators: decides, counts, and moves the running statistics.
void update(
    std::array<Tensor, 10> buffers,
    const Tensor& summary,
    std::optional<double> momentum,
    std::optional<double> threshold,
    int64_t warmup,
    int64_t patience,
    std::optional<double> z,
    double weight) {
  const int64_t channels = buffers[0].numel();
  TORCH_CHECK(
      summary.numel() == 2 * channels + 3 && buffers[1].numel() == channels,
      "UBN: running_mean has ", channels, " values and running_var ", buffers[1].numel(),
      " for an input of ", (summary.numel() - 3) / 2, " channels");
  for (const Tensor& buffer : buffers)
    TORCH_CHECK(
        buffer.device() == summary.device(),
        "UBN: the input is on ", summary.device(), " and the layer's buffers on ",
        buffer.device(), ": move one of them");
  AT_DISPATCH_FLOATING_TYPES(summary.scalar_type(), "update", [&] {
    update_from(
        buffers, summary.data_ptr<scalar_t>(), channels, momentum, threshold, warmup, patience, z,
        weight);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using Guard = py::call_guard<py::gil_scoped_release>;
  // Goes up with every change of what the functions below take or return: see dispatch.py.
  module.attr("INTERFACE") = 2;
  module.def("moments", &moments, Guard());
  module.def("train", &train, Guard());
  module.def("normalize", &normalize, Guard());
  module.def("evaluate", &evaluate, Guard());
  module.def("reduce", &reduce, Guard());
  module.def("input_gradient", &input_gradient, Guard());
  module.def("backward", &backward, Guard());
  module.def("update", &update, Guard());
}

}  // namespace ubn
