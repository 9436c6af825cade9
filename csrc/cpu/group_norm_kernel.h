#include "cpu/simd.h"
#include "cpu/normalise.h"

template <class T>
void widen(const T* p, int64_t n, accumulator_t<T>* out) {
  for (int64_t i = 0; i < n; i += kLanes<accumulator_t<T>>) store(out + i, load(p + i, n - i), n - i);
}

template <class T>
void round_sums(const accumulator_t<T>* sums, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes<accumulator_t<T>>) store(out + i, load(sums + i, n - i), n - i);
}

// Mean and sum of squared distances from it, of numbers that arrive in portions (Chan, Golub and LeVeque 1979): nothing
// cancels where the mean is large.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  FASTVIT_INLINE void add(double n, double its_mean, double its_squares) {
    const double total = count + n, away = its_mean - mean;
    mean += away * (n / total);
    squares += its_squares + away * away * (count * n / total);
    count = total;
  }

  template <class A>
  FASTVIT_INLINE void write(double eps, A* mean_out, A* rstd_out) const {
    const double variance = count > 0 ? squares / count : 0;
    *mean_out = A(mean);
    *rstd_out = A(1 / std::sqrt((variance > 0 || variance != variance ? variance : 0) + eps));
  }
};

// Of numbers that the L1 cache holds, in two passes.
template <class T>
FASTVIT_INLINE void add_portion(const T* x, int64_t n, Moments& moments) {
  using A = accumulator_t<T>;
  A total, unused, remainder, squares;
  reduce<A>(n, total, unused, [&](int64_t i, int64_t left, Vec<A>& a, Vec<A>&) { a += load(x + i, left); });
  const A mean = total / A(n);
  reduce<A>(n, remainder, squares, [&](int64_t i, int64_t left, Vec<A>& a, Vec<A>& b) {
    Vec<A> centred = load(x + i, left) - mean;
    if (left < kLanes<A>) centred = fill_beyond<A>(centred, left, 0);
    a += centred;
    b += centred * centred;
  });
  // What rounding took from the mean is given back, so that numbers far from zero keep their variance.
  const double missed = double(remainder) / double(n);
  moments.add(double(n), double(mean) + missed, double(squares) - missed * missed * double(n));
}

// Zero where the result is not positive; a NaN passes, as it passes PyTorch's ReLU and its derivative.
template <class A>
FASTVIT_INLINE Vec<A> passed(Vec<A> value, Vec<A> result) {
  return result <= Vec<A>{} ? Vec<A>{} : value;
}

template <class T>
void normalise_group(const GroupNormArgs<T>& args, int64_t unit) {
  using A = accumulator_t<T>;
  constexpr int64_t kPortion = 2048;
  const Maps& m = args.maps;
  const int64_t sample = unit / m.groups, first = unit % m.groups * m.group_channels(), size = m.group_size();
  const T* x = args.x + sample * args.x_stride + first * m.positions;
  Moments moments;
  for (int64_t i = 0; i < size; i += kPortion) add_portion(x + i, size - i < kPortion ? size - i : kPortion, moments);
  moments.write(args.eps, args.mean + unit, args.rstd + unit);
  const A mean = args.mean[unit], rstd = args.rstd[unit];
  T* y = args.y + (sample * m.channels + first) * m.positions;
  for (int64_t c = 0; c < m.group_channels(); c++) {
    const A scale = rstd * args.weight[first + c], bias = args.bias[first + c];
    for (int64_t i = 0; i < m.positions; i += kLanes<A>) {
      const int64_t left = m.positions - i, at = c * m.positions + i;
      const Vec<A> v = (load(x + at, left) - mean) * scale + bias;
      store(y + at, args.relu ? passed<A>(v, v) : v, left);
    }
  }
}

template <class T>
void differentiate_group(const GroupNormBackwardArgs<T>& g, int64_t unit) {
  using A = accumulator_t<T>;
  const Maps& m = g.maps;
  const int64_t sample = unit / m.groups, first = unit % m.groups * m.group_channels();
  const T* x = g.x + sample * g.x_stride + first * m.positions;
  const T* dy = g.dy + sample * g.dy_stride + first * m.positions;
  T* dx = g.dx + (sample * m.channels + first) * m.positions;
  A* sums = g.sums + sample * 2 * m.channels + first;
  const A mean = g.mean[unit], rstd = g.rstd[unit];
  // What came through the ReLU at x; both are zero beyond the channel's last position.
  const auto upstream = [&](int64_t c, int64_t at, int64_t left, Vec<A>& centred) {
    centred = load(x + at, left) - mean;
    const Vec<A> u = load(dy + at, left);
    return g.relu ? passed<A>(u, centred * (rstd * g.weight[first + c]) + g.bias[first + c]) : u;
  };
  A along = 0, total = 0;
  for (int64_t c = 0; c < m.group_channels(); c++) {
    A product, sum;
    reduce<A>(m.positions, product, sum, [&](int64_t i, int64_t left, Vec<A>& a, Vec<A>& b) {
      Vec<A> centred;
      const Vec<A> u = upstream(c, c * m.positions + i, left, centred);
      if (left < kLanes<A>) centred = fill_beyond<A>(centred, left, 0);
      a += u * centred;
      b += u;
    });
    sums[c] = product * rstd;
    sums[m.channels + c] = sum;
    along += g.weight[first + c] * sums[c];
    total += g.weight[first + c] * sum;
  }
  const A size = A(m.group_size()), level = total / size * rstd, slope = along / size * rstd * rstd;
  for (int64_t c = 0; c < m.group_channels(); c++) {
    const A scale = rstd * g.weight[first + c];
    for (int64_t i = 0; i < m.positions; i += kLanes<A>) {
      const int64_t left = m.positions - i, at = c * m.positions + i;
      Vec<A> centred;
      const Vec<A> u = upstream(c, at, left, centred);
      store(dx + at, u * scale - level - centred * slope, left);
    }
  }
}

// Channels last: the positions of one part of a sample.
struct Part {
  int64_t sample, begin, end;

  FASTVIT_INLINE Part(const Maps& m, int64_t unit)
      : sample(unit / m.parts()),
        begin(m.positions * (unit % m.parts()) / m.parts()),
        end(m.positions * (unit % m.parts() + 1) / m.parts()) {}
};

template <class T>
void measure_part(const GroupNormArgs<T>& args, int64_t unit) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>;
  const Maps& m = args.maps;
  const Part part(m, unit);
  const int64_t C = m.channels, rows = part.end - part.begin, width = m.group_channels();
  const T* x = args.x + part.sample * args.x_stride + part.begin * C;
  const Scratch scratch(3 * C * sizeof(A));
  A *mean = scratch.as<A>(), *remainder = mean + C, *squares = remainder + C;
  // Four rows at a time, for a fourth of the traffic of the sums.
  const auto each_row = [&](const auto& f) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
      for (int64_t i = 0; i < C; i += lanes) f(x + row * C + i, i, C - i, std::integral_constant<int, 4>{});
    for (; row < rows; row++)
      for (int64_t i = 0; i < C; i += lanes) f(x + row * C + i, i, C - i, std::integral_constant<int, 1>{});
  };
  for (int64_t i = 0; i < 3 * C; i++) mean[i] = 0;
  each_row([&](const T* at, int64_t i, int64_t left, auto count) {
    Vec<A> sum = load(mean + i, left);
    for (int r = 0; r < count; r++) sum += load(at + r * C, left);
    store(mean + i, sum, left);
  });
  for (int64_t i = 0; i < C; i++) mean[i] /= A(rows);
  each_row([&](const T* at, int64_t i, int64_t left, auto count) {
    const Vec<A> middle = load(mean + i, left);
    Vec<A> sum = load(remainder + i, left), square = load(squares + i, left);
    for (int r = 0; r < count; r++) {
      const Vec<A> centred = load(at + r * C, left) - middle;
      sum += centred;
      square += centred * centred;
    }
    store(remainder + i, sum, left);
    store(squares + i, square, left);
  });
  double* out = args.moments + unit * m.groups * 2;
  for (int64_t group = 0; group < m.groups; group++, out += 2) {
    // Every channel counts as many numbers: the group's mean is that of the channels' means.
    const int64_t first = group * width;
    double average = 0, total = 0;
    for (int64_t c = first; c < first + width; c++) average += double(mean[c]) + double(remainder[c]) / double(rows);
    average /= double(width);
    for (int64_t c = first; c < first + width; c++) {
      const double missed = double(remainder[c]) / double(rows), away = double(mean[c]) + missed - average;
      total += double(squares[c]) + (away * away - missed * missed) * double(rows);
    }
    out[0] = average;
    out[1] = total;
  }
}

template <class T>
void combine_parts(const GroupNormArgs<T>& args, int64_t unit) {
  const Maps& m = args.maps;
  const int64_t sample = unit / m.groups, group = unit % m.groups;
  Moments moments;
  for (int64_t p = 0; p < m.parts(); p++) {
    const Part part(m, sample * m.parts() + p);
    const double* its = args.moments + ((sample * m.parts() + p) * m.groups + group) * 2;
    moments.add(double((part.end - part.begin) * m.group_channels()), its[0], its[1]);
  }
  moments.write(args.eps, args.mean + unit, args.rstd + unit);
}

// A sample's mean and rstd · weight for each channel.
template <class A>
FASTVIT_INLINE void spread(const Maps& m, const A* mean, const A* rstd, const A* weight, A* means, A* scales) {
  for (int64_t c = 0, group = 0; group < m.groups; group++)
    for (const int64_t end = c + m.group_channels(); c < end; c++) {
      means[c] = mean[group];
      scales[c] = rstd[group] * weight[c];
    }
}

template <class T>
void normalise_part(const GroupNormArgs<T>& args, int64_t unit) {
  using A = accumulator_t<T>;
  const Maps& m = args.maps;
  const Part part(m, unit);
  const int64_t C = m.channels;
  const Scratch scratch(2 * C * sizeof(A));
  A *means = scratch.as<A>(), *scales = means + C;
  spread(m, args.mean + part.sample * m.groups, args.rstd + part.sample * m.groups, args.weight, means, scales);
  for (int64_t row = part.begin; row < part.end; row++) {
    const T* x = args.x + part.sample * args.x_stride + row * C;
    T* y = args.y + (part.sample * m.positions + row) * C;
    for (int64_t i = 0; i < C; i += kLanes<A>) {
      const int64_t left = C - i;
      const Vec<A> v = (load(x + i, left) - load(means + i, left)) * load(scales + i, left) + load(args.bias + i, left);
      store(y + i, args.relu ? passed<A>(v, v) : v, left);
    }
  }
}

template <class T>
void sum_part(const GroupNormBackwardArgs<T>& g, int64_t unit) {
  using A = accumulator_t<T>;
  const Maps& m = g.maps;
  const Part part(m, unit);
  const int64_t C = m.channels;
  A *products = g.shares + unit * 2 * C, *totals = products + C;
  const Scratch scratch(2 * C * sizeof(A));
  A *means = scratch.as<A>(), *scales = means + C;
  spread(m, g.mean + part.sample * m.groups, g.rstd + part.sample * m.groups, g.weight, means, scales);
  for (int64_t i = 0; i < 2 * C; i++) products[i] = 0;
  for (int64_t row = part.begin; row < part.end; row++) {
    const T* x = g.x + part.sample * g.x_stride + row * C;
    const T* dy = g.dy + part.sample * g.dy_stride + row * C;
    for (int64_t i = 0; i < C; i += kLanes<A>) {
      const int64_t left = C - i;
      const Vec<A> centred = load(x + i, left) - load(means + i, left);
      Vec<A> u = load(dy + i, left);
      if (g.relu) u = passed<A>(u, centred * load(scales + i, left) + load(g.bias + i, left));
      store(products + i, load(products + i, left) + u * centred, left);
      store(totals + i, load(totals + i, left) + u, left);
    }
  }
}

// Of one sample, part by part.
template <class T>
void add_parts(const GroupNormBackwardArgs<T>& g, int64_t sample) {
  using A = accumulator_t<T>;
  const Maps& m = g.maps;
  const int64_t C = m.channels;
  A* sums = g.sums + sample * 2 * C;
  for (int64_t i = 0; i < 2 * C; i += kLanes<A>) {
    Vec<A> total = {};
    for (int64_t p = 0; p < m.parts(); p++) total += load(g.shares + (sample * m.parts() + p) * 2 * C + i, 2 * C - i);
    store(sums + i, total, 2 * C - i);
  }
  for (int64_t c = 0; c < C; c++) sums[c] *= g.rstd[sample * m.groups + c / m.group_channels()];
}

template <class T>
void differentiate_part(const GroupNormBackwardArgs<T>& g, int64_t unit) {
  using A = accumulator_t<T>;
  const Maps& m = g.maps;
  const Part part(m, unit);
  const int64_t C = m.channels, width = m.group_channels();
  const A* sums = g.sums + part.sample * 2 * C;
  const A* rstd = g.rstd + part.sample * m.groups;
  const Scratch scratch(4 * C * sizeof(A));
  A *means = scratch.as<A>(), *scales = means + C, *levels = scales + C, *slopes = levels + C;
  spread(m, g.mean + part.sample * m.groups, rstd, g.weight, means, scales);
  for (int64_t group = 0; group < m.groups; group++) {
    A along = 0, total = 0;
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      along += g.weight[c] * sums[c];
      total += g.weight[c] * sums[C + c];
    }
    const A size = A(m.group_size());
    for (int64_t c = group * width; c < (group + 1) * width; c++) {
      levels[c] = total / size * rstd[group];
      slopes[c] = along / size * rstd[group] * rstd[group];
    }
  }
  for (int64_t row = part.begin; row < part.end; row++) {
    const T* x = g.x + part.sample * g.x_stride + row * C;
    const T* dy = g.dy + part.sample * g.dy_stride + row * C;
    T* dx = g.dx + (part.sample * m.positions + row) * C;
    for (int64_t i = 0; i < C; i += kLanes<A>) {
      const int64_t left = C - i;
      const Vec<A> centred = load(x + i, left) - load(means + i, left), scale = load(scales + i, left);
      Vec<A> u = load(dy + i, left);
      if (g.relu) u = passed<A>(u, centred * scale + load(g.bias + i, left));
      store(dx + i, u * scale - load(levels + i, left) - centred * load(slopes + i, left), left);
    }
  }
}
