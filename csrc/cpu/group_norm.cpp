#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "cpu/parallel.h"

namespace fastvit {

// Maps (B, C, positions): samples any stride apart, in each of which either the positions of a channel are neighbours
// or, channels last, the channels of a position.
struct Maps {
  int64_t samples = 0, channels = 0, positions = 0, groups = 0;
  bool channels_last = false;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_size() const { return group_channels() * positions; }
  // Channels last, the positions of a sample are taken in so many parts, whatever the number of threads, so that the
  // bits do not depend on it. 32768 numbers stay in the L2 cache between two passes over them.
  int64_t parts() const { return std::max<int64_t>(1, positions / std::max<int64_t>(64, 32768 / channels)); }
};

// y = relu((x - mean) rstd weight + bias), mean and rstd (B, groups) of each group.
template <class T>
struct GroupNormArgs {
  using A = accumulator_t<T>;
  Maps maps;
  const T* x = nullptr;
  int64_t x_stride = 0;
  const A* weight = nullptr;
  const A* bias = nullptr;
  double eps = 0;
  bool relu = false;
  A* mean = nullptr;
  A* rstd = nullptr;
  T* y = nullptr;
  double* moments = nullptr;  // channels last: mean and squares of each part's groups, (B, parts, groups, 2)
};

// With u = dy where the result passed the ReLU and n = (x - mean) rstd: dx = rstd (u weight - a - n b), where a and b
// are the means of u weight and u weight n over the group; dweight = Σ u n, dbias = Σ u.
template <class T>
struct GroupNormBackwardArgs {
  using A = accumulator_t<T>;
  Maps maps;
  const T* dy = nullptr;
  int64_t dy_stride = 0;
  const T* x = nullptr;
  int64_t x_stride = 0;
  const A* mean = nullptr;
  const A* rstd = nullptr;
  const A* weight = nullptr;
  const A* bias = nullptr;
  bool relu = false;
  A* sums = nullptr;    // of u n and of u for each channel of each sample, (B, 2, C)
  A* shares = nullptr;  // channels last: the same of each part, (B, parts, 2, C)
  T* dx = nullptr;
};

}  // namespace fastvit

#define FASTVIT_KERNELS "cpu/group_norm_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "group_norm";

Maps maps_of(const Tensor& x, int64_t groups) {
  FASTVIT_CHECK(x.dim() == 3, kOp, ": x must have shape (B, C, positions)");
  const int64_t channels = x.size(1), positions = x.size(2);
  FASTVIT_CHECK(groups > 0 && channels > 0 && channels % groups == 0, kOp, ": groups must share the channels evenly");
  const auto steps = [&](int64_t channel, int64_t position) {
    return (channels == 1 || x.stride(1) == channel) && (positions <= 1 || x.stride(2) == position);
  };
  const bool planes = positions == 0 || steps(positions, 1);
  FASTVIT_CHECK(planes || steps(1, channels), kOp, ": each sample of x must be dense, channels first or last");
  return {x.size(0), channels, positions, groups, !planes};
}

// A new tensor that lies as the maps do, its samples one after the other.
Tensor empty_maps(const Tensor& like, const Maps& m) {
  if (!m.channels_last) return empty(like, {m.samples, m.channels, m.positions});
  return torch::stable::transpose(empty(like, {m.samples, m.positions, m.channels}), 1, 2);
}

// A parameter in x's dtype or the sums', as the latter; `absent` where there is none.
template <class T, class A = accumulator_t<T>>
void read_parameter(const OptionalTensor& parameter, const Tensor& x, int64_t n, A absent, const char* name, A* out) {
  if (!parameter) {
    std::fill(out, out + n, absent);
  } else if (parameter->scalar_type() == statistics_dtype(x)) {
    const A* p = vector<A>(parameter, n, x, statistics_dtype(x), kOp, name);
    std::copy(p, p + n, out);
  } else {
    FASTVIT_SELECT(widen<T>)(vector<T>(parameter, n, x, kOp, name), n, out);
  }
}

// Calls f with each unit of work, a few at a time where units are small.
template <class F>
void for_units(int64_t units, int64_t unit_size, const F& f) {
  parallel_for(units, 16384 / (unit_size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) f(unit);
  });
}

template <class T>
void run_forward(const GroupNormArgs<T>& args) {
  const Maps& m = args.maps;
  const int64_t groups = m.samples * m.groups, parts = m.samples * m.parts(), part_size = m.positions * m.channels;
  if (!m.channels_last) {
    const auto group = FASTVIT_SELECT(normalise_group<T>);
    return for_units(groups, m.group_size(), [&](int64_t unit) { group(args, unit); });
  }
  const auto measure = FASTVIT_SELECT(measure_part<T>);
  const auto combine = FASTVIT_SELECT(combine_parts<T>);
  const auto normalise = FASTVIT_SELECT(normalise_part<T>);
  for_units(parts, part_size / m.parts(), [&](int64_t unit) { measure(args, unit); });
  for_units(groups, m.parts() * 16, [&](int64_t unit) { combine(args, unit); });
  for_units(parts, part_size / m.parts(), [&](int64_t unit) { normalise(args, unit); });
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool relu) {
  const Maps maps = maps_of(x, num_groups);
  Tensor y = empty_maps(x, maps);
  Tensor mean = empty(x, {maps.samples, num_groups}, statistics_dtype(x));
  Tensor rstd = empty(x, {maps.samples, num_groups}, statistics_dtype(x));
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const Scratch parameters(2 * maps.channels * sizeof(A));
    const Scratch moments(maps.channels_last ? maps.samples * maps.parts() * num_groups * 2 * sizeof(double) : 0);
    GroupNormArgs<T> args;
    args.maps = maps;
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.x_stride = x.stride(0);
    read_parameter<T>(weight, x, maps.channels, A(1), "weight", parameters.as<A>());
    read_parameter<T>(bias, x, maps.channels, A(0), "bias", parameters.as<A>() + maps.channels);
    args.weight = parameters.as<A>();
    args.bias = parameters.as<A>() + maps.channels;
    args.eps = eps;
    args.relu = relu;
    args.mean = data<A>(mean);
    args.rstd = data<A>(rstd);
    args.y = data<T>(y);
    args.moments = moments.as<double>();
    run_forward(args);
  });
  return {y, mean, rstd};
}

template <class T>
void run_backward(const GroupNormBackwardArgs<T>& args) {
  const Maps& m = args.maps;
  if (!m.channels_last) {
    const auto group = FASTVIT_SELECT(differentiate_group<T>);
    return for_units(m.samples * m.groups, m.group_size(), [&](int64_t unit) { group(args, unit); });
  }
  const int64_t parts = m.samples * m.parts(), part_size = m.positions * m.channels / m.parts();
  const auto sum = FASTVIT_SELECT(sum_part<T>);
  const auto add = FASTVIT_SELECT(add_parts<T>);
  const auto differentiate = FASTVIT_SELECT(differentiate_part<T>);
  for_units(parts, part_size, [&](int64_t unit) { sum(args, unit); });
  for_units(m.samples, m.parts() * m.channels, [&](int64_t unit) { add(args, unit); });
  for_units(parts, part_size, [&](int64_t unit) { differentiate(args, unit); });
}

// The sum over samples of a parameter's gradient, in the parameter's dtype.
template <class T, class A = accumulator_t<T>>
Tensor sum_of_samples(const Tensor& x, const OptionalTensor& weight, A* sums, const Maps& m) {
  for (int64_t sample = 1; sample < m.samples; sample++)
    for (int64_t c = 0; c < m.channels; c++) sums[c] += sums[sample * 2 * m.channels + c];
  if (m.samples * m.positions == 0) std::fill(sums, sums + m.channels, A(0));
  const bool wide = weight && weight->scalar_type() == statistics_dtype(x);
  Tensor gradient = empty(x, {m.channels}, wide ? statistics_dtype(x) : x.scalar_type());
  if (wide)
    std::copy(sums, sums + m.channels, data<A>(gradient));
  else
    FASTVIT_SELECT(round_sums<T>)(sums, m.channels, data<T>(gradient));
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, bool relu) {
  FASTVIT_CHECK(mean.dim() == 2 && mean.size(0) == x.size(0), kOp, ": mean must have shape (B, groups)");
  const Maps maps = maps_of(x, mean.size(1)), upstream = maps_of(dy, mean.size(1));
  check_like(dy, x, x.scalar_type(), kOp, "dy");
  FASTVIT_CHECK(dy.size(0) == maps.samples && upstream.channels == maps.channels &&
                    upstream.positions == maps.positions && upstream.channels_last == maps.channels_last,
                kOp, ": dy must have x's shape and order of dimensions");
  const auto statistics = [&](const Tensor& t, const char* name) {
    check_like(t, x, statistics_dtype(x), kOp, name);
    FASTVIT_CHECK(t.dim() == 2 && t.size(0) == maps.samples && t.size(1) == maps.groups && t.is_contiguous(), kOp, ": ",
                  name, " must be contiguous with shape (B, groups)");
    return t.const_data_ptr();
  };
  Tensor dx = empty_maps(x, maps), dweight = dx, dbias = dx;
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const int64_t line = 2 * maps.channels, shares = maps.channels_last ? maps.samples * maps.parts() : 0;
    const Scratch scratch((1 + std::max<int64_t>(maps.samples, 1) + shares) * line * sizeof(A));
    A* const parameters = scratch.as<A>();
    GroupNormBackwardArgs<T> args;
    args.maps = maps;
    args.dy = static_cast<const T*>(dy.const_data_ptr());
    args.dy_stride = dy.stride(0);
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.x_stride = x.stride(0);
    args.mean = static_cast<const A*>(statistics(mean, "mean"));
    args.rstd = static_cast<const A*>(statistics(rstd, "rstd"));
    read_parameter<T>(weight, x, maps.channels, A(1), "weight", parameters);
    read_parameter<T>(bias, x, maps.channels, A(0), "bias", parameters + maps.channels);
    args.weight = parameters;
    args.bias = parameters + maps.channels;
    args.relu = relu;
    args.sums = parameters + line;
    args.shares = args.sums + std::max<int64_t>(maps.samples, 1) * line;
    args.dx = data<T>(dx);
    run_backward(args);
    dweight = sum_of_samples<T>(x, weight, args.sums, maps);
    dbias = sum_of_samples<T>(x, bias, args.sums + maps.channels, maps);
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&fastvit::group_norm));
  m.impl("group_norm_backward", TORCH_BOX(&fastvit::group_norm_backward));
}
