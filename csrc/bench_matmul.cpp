// Measures matmul on this machine: GFLOP/s, GB/s, the share of a measured float32 multiply-add peak, and int8 against
// bf16.
//   bench_matmul [--isa NAME] [--dtype bf16|int8|both] [--threads 1,2] [--shapes smollm2|1b] [--only NAME] [--rows
//   1,8,64] [--seconds 0.02]
//                [--repeats 5] [--l2-bytes 524288]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "ops/matmul.h"
#include "ops/matmul_kernels.h"
#include "ops/matmul_shapes.h"
#include "tensor.h"
#include "threads.h"

namespace blendserve {
namespace {

// The calling thread's processor time where one thread runs (others on a shared machine do not count), else the wall's.
double now_s(bool is_cpu_time) {
  timespec now;
  clock_gettime(is_cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

struct Options {
  Isa isa = best_isa();
  std::vector<Dtype> dtypes = {Dtype::kBf16, Dtype::kInt8};  // measured in turn
  std::vector<int64_t> threads = {1, 2};
  std::span<const MatmulShape> shapes = kSmolLm2Shapes;
  std::vector<int64_t> rows = {std::begin(kMatmulRows), std::end(kMatmulRows)};
  double seconds = 0.02;
  int repeats = 5;
  int64_t l2_bytes = 512 * 1024;
  std::string only;
};

// Seconds of one call: the median tells what this machine gave, the best what the kernel can do on a quiet one.
struct Timing {
  double median, best;
};

// One sample of at least `seconds`; `calls` is how often the op is called for that, and grows to what is needed.
double sample_op(const std::function<void()>& op, bool is_cpu_time, double seconds, int64_t& calls) {
  for (;;) {
    const double start = now_s(is_cpu_time);
    for (int64_t i = 0; i < calls; ++i) op();
    const double elapsed = now_s(is_cpu_time) - start;
    if (elapsed >= seconds) return elapsed / static_cast<double>(calls);
    calls = std::max(calls + 1, static_cast<int64_t>(static_cast<double>(calls) * seconds / elapsed * 1.1));
  }
}

// Samples of several ops, taken in turn, so that what else the machine does meets all of them alike.
std::vector<std::vector<double>> sample_in_turn(std::span<const std::function<void()>> ops, bool is_cpu_time,
                                                double seconds, int repeats) {
  std::vector<std::vector<double>> samples(ops.size());
  std::vector<int64_t> calls(ops.size(), 1);
  for (size_t i = 0; i < ops.size(); ++i) sample_op(ops[i], is_cpu_time, seconds, calls[i]);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (size_t i = 0; i < ops.size(); ++i) {
      samples[i].push_back(sample_op(ops[i], is_cpu_time, seconds, calls[i]));
    }
  }
  return samples;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Timing timing(const std::vector<double>& samples) {
  return {median(samples), *std::min_element(samples.begin(), samples.end())};
}

// How much faster the second is: the median over pairs of samples.
double median_ratio(const std::vector<double>& first, const std::vector<double>& second) {
  std::vector<double> ratios;
  for (size_t i = 0; i < first.size(); ++i) ratios.push_back(first[i] / second[i]);
  return median(ratios);
}

#if defined(__x86_64__)
// 12 independent chains of multiply-adds on registers: as fast as one core can go.
[[gnu::target("avx2,fma"), gnu::noinline]] void multiply_add_loop(int64_t iterations) {
  typedef float Floats __attribute__((vector_size(32)));
  Floats a[12] = {};
  Floats x = Floats{} + 0.5f;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (auto& sum : a) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(x));
  }
}
double multiply_add_gflop_per_s(ThreadTeam& team) {
  constexpr int64_t kIterations = 100000;  // about 1 ms
  const std::function<void()> op = [&] {
    team.run(team.num_threads(), [](int64_t, int) { multiply_add_loop(kIterations); });
  };
  const Timing time = timing(sample_in_turn({&op, 1}, team.num_threads() == 1, 0.02, 5).front());
  return static_cast<double>(team.num_threads() * kIterations * 12 * 16) / time.best * 1e-9;
}
#else
double multiply_add_gflop_per_s(ThreadTeam&) { return 0; }
#endif

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
  return values;
}

// A product in one format, on weights that come from memory.
class Product {
 public:
  Product(const Options& options, MatmulFormat format, const MatmulShape& shape, int64_t m, ThreadTeam& team)
      : format_(format),
        shape_(shape),
        m_(m),
        team_(team),
        x_(random_floats(m * shape.k)),
        y_(static_cast<size_t>(m * shape.n)),
        packed_(activation_bytes(format, m, shape.k)),
        grid_(suggest_grid(format, m, shape.n, shape.k, team.num_threads(), options.l2_bytes)) {}

  // Packs the rows and multiplies by the next copy of the weights.
  void run(std::span<const PackedMatrix> copies) {
    const PackedMatrix& w = copies[turn_++ % copies.size()];
    team_.run(kernels::ceil_div(m_, kRowPanel), [&](int64_t panel, int) {
      pack_activations(format_, x_.data(), shape_.k, panel * kRowPanel, std::min(m_, (panel + 1) * kRowPanel), shape_.k,
                       packed_.data());
    });
    team_.run(grid_.size(), [&](int64_t tile, int) {
      matmul_tile(packed_.data(), w, grid_.tile(tile), nullptr, false, y_.data(), shape_.n);
    });
  }
  const MatmulGrid& grid() const { return grid_; }

 private:
  MatmulFormat format_;
  MatmulShape shape_;
  int64_t m_;
  ThreadTeam& team_;
  std::vector<float> x_, y_;
  Buffer<uint8_t> packed_;
  MatmulGrid grid_;
  size_t turn_ = 0;
};

void print_row(const MatmulShape& shape, int64_t m, int num_threads, Dtype dtype, const MatmulGrid& grid,
               const Timing& time, double peak) {
  const double flop = static_cast<double>(shape.flop(m));
  const int64_t bytes = shape.bytes(m) - (dtype == Dtype::kInt8 ? shape.weight_bytes() / 2 : 0);
  std::printf("%-10s %5ld %2d %s  %4ldx%-5ld %9.1f %9.1f us %8.1f %8.1f GFLOP/s %5.1f%% %7.1f GB/s", shape.name.data(),
              m, num_threads, dtype_name(dtype).data(), grid.row_tile, grid.col_tile, time.median * 1e6,
              time.best * 1e6, flop / time.median * 1e-9, flop / time.best * 1e-9, 100e-9 * flop / time.best / peak,
              static_cast<double>(bytes) / time.best * 1e-9);
}

// `copies[i]` are weights in options.dtypes[i].
void measure(const Options& options, ThreadTeam& team, const MatmulShape& shape,
             std::span<const std::vector<PackedMatrix>> copies) {
  for (const int64_t m : options.rows) {
    std::vector<Product> products;
    products.reserve(copies.size());
    std::vector<std::function<void()>> ops;
    for (size_t i = 0; i < copies.size(); ++i) {
      products.emplace_back(options, MatmulFormat(options.isa, options.dtypes[i]), shape, m, team);
      ops.emplace_back([&product = products.back(), &weights = copies[i]] { product.run(weights); });
    }
    const double peak = multiply_add_gflop_per_s(team);  // next to each measurement: neighbours come and go
    const auto samples = sample_in_turn(ops, team.num_threads() == 1, options.seconds, options.repeats);
    for (size_t i = 0; i < copies.size(); ++i) {
      print_row(shape, m, team.num_threads(), options.dtypes[i], products[i].grid(), timing(samples[i]), peak);
      if (i > 0) std::printf("  %.2fx", median_ratio(samples[0], samples[i]));
      std::printf("\n");
    }
    std::fflush(stdout);
  }
}

std::vector<int64_t> int_list(const char* text) {
  std::vector<int64_t> values;
  for (char* end; *text != '\0'; text = *end == ',' ? end + 1 : end) values.push_back(std::strtol(text, &end, 10));
  return values;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* value = argv[i + 1];
    if (name == "--isa")
      options.isa = isa_from_name(value);
    else if (name == "--dtype")
      options.dtypes = std::strcmp(value, "both") == 0 ? std::vector{Dtype::kBf16, Dtype::kInt8}
                                                       : std::vector{dtype_from_name(value)};
    else if (name == "--threads")
      options.threads = int_list(value);
    else if (name == "--rows")
      options.rows = int_list(value);
    else if (name == "--seconds")
      options.seconds = std::atof(value);
    else if (name == "--repeats")
      options.repeats = std::atoi(value);
    else if (name == "--l2-bytes")
      options.l2_bytes = std::atol(value);
    else if (name == "--only")
      options.only = value;
    else if (name == "--shapes")
      options.shapes = std::strcmp(value, "1b") == 0 ? std::span<const MatmulShape>(kLlama1bShapes) : kSmolLm2Shapes;
    else
      std::fprintf(stderr, "unknown option %s\n", argv[i]), std::exit(2);
  }
  return options;
}

int run(const Options& options) {
  for (const int64_t threads : options.threads) {
    ThreadTeam team(static_cast<int>(threads));
    std::printf("isa %s, %ld threads, multiply-add peak %.1f GFLOP/s\n", isa_name(options.isa).data(), threads,
                multiply_add_gflop_per_s(team));
    std::printf("%-10s %5s %2s %4s  %-10s %9s %9s    %8s %8s\n", "shape", "m", "t", "", "tile", "median", "best",
                "median", "best");
    for (const MatmulShape& shape : options.shapes) {
      if (!options.only.empty() && options.only != shape.name) continue;
      // Copies that exceed the last-level cache, as a step over many layers does.
      const std::vector<float> weights = random_floats(shape.n * shape.k);
      std::vector<std::vector<PackedMatrix>> copies(options.dtypes.size());
      WeightMemory memory;
      const int64_t num_copies = std::max<int64_t>(1, (int64_t{96} << 20) / shape.weight_bytes());
      for (size_t i = 0; i < copies.size(); ++i) {
        const MatmulFormat format(options.isa, options.dtypes[i]);
        const int64_t count = format.dtype == Dtype::kInt8 ? 2 * num_copies : num_copies;
        for (int64_t n = 0; n < count; ++n)
          copies[i].emplace_back(format, std::span(weights), shape.n, shape.k, &memory);
      }
      measure(options, team, shape, copies);
    }
  }
  return 0;
}

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) { return blendserve::run(blendserve::parse(argc, argv)); }
