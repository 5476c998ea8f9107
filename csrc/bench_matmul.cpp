// Measures matmul on this machine: GFLOP/s, GB/s and the share of a measured multiply-add peak.
//   bench_matmul [--isa NAME] [--threads 1,2] [--shapes smollm2|1b] [--only NAME] [--rows 1,8,64] [--seconds 0.02]
//                [--repeats 5] [--l2-bytes 524288]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "ops/matmul.h"
#include "ops/matmul_kernels.h"
#include "ops/table.h"
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

// Over `repeats` samples of at least `seconds` each.
template <class Op>
Timing time_op(const Op& op, bool is_cpu_time, double seconds, int repeats) {
  op();
  std::vector<double> samples;
  int64_t calls = 1;
  while (static_cast<int>(samples.size()) < repeats) {
    const double start = now_s(is_cpu_time);
    for (int64_t i = 0; i < calls; ++i) op();
    const double elapsed = now_s(is_cpu_time) - start;
    if (elapsed < seconds) {
      calls = std::max(calls + 1, static_cast<int64_t>(static_cast<double>(calls) * seconds / elapsed * 1.1));
      continue;
    }
    samples.push_back(elapsed / static_cast<double>(calls));
  }
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.front()};
}

#if defined(__x86_64__)
// 12 independent chains of multiply-adds on registers: as fast as one core can go.
[[gnu::target("avx2,fma"), gnu::noinline]] void multiply_add_loop(int64_t steps) {
  typedef float Floats __attribute__((vector_size(32)));
  Floats a[12] = {};
  Floats x = Floats{} + 0.5f;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (auto& sum : a) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(x));
  }
}
double multiply_add_gflop_per_s(ThreadTeam& team) {
  constexpr int64_t kSteps = 100000;  // about 1 ms
  const Timing time = time_op([&] { team.run(team.num_threads(), [](int64_t, int) { multiply_add_loop(kSteps); }); },
                              team.num_threads() == 1, 0.02, 5);
  return static_cast<double>(team.num_threads() * kSteps * 12 * 16) / time.best * 1e-9;
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

void measure(const Options& options, ThreadTeam& team, const MatmulShape& shape, std::span<const PackedMatrix> copies) {
  for (const int64_t m : options.rows) {
    const std::vector<float> x = random_floats(m * shape.k);
    const int64_t x_bytes = activation_bytes(options.isa, m, shape.k);
    void* packed = std::aligned_alloc(64, static_cast<size_t>(kernels::round_up(x_bytes, 64)));
    std::vector<float> y(static_cast<size_t>(m * shape.n));
    const MatmulGrid grid = suggest_grid(options.isa, m, shape.n, shape.k, team.num_threads(), options.l2_bytes);
    const int64_t num_panels = kernels::ceil_div(m, kRowPanel);
    size_t turn = 0;
    const auto op = [&] {
      const PackedMatrix& w = copies[turn++ % copies.size()];
      team.run(num_panels, [&](int64_t panel, int) {
        pack_activations(options.isa, x.data(), shape.k, panel * kRowPanel, std::min(m, (panel + 1) * kRowPanel),
                         shape.k, packed);
      });
      team.run(grid.size(),
               [&](int64_t tile, int) { matmul_tile(packed, w, grid.tile(tile), nullptr, false, y.data(), shape.n); });
    };
    const double peak = multiply_add_gflop_per_s(team);  // next to each measurement: neighbours come and go
    const Timing time = time_op(op, team.num_threads() == 1, options.seconds, options.repeats);
    const double flop = static_cast<double>(shape.flop(m));
    std::printf("%-10s %5ld %2d  %4ldx%-5ld %9.1f %9.1f us %8.1f %8.1f GFLOP/s %5.1f%% %7.1f GB/s\n", shape.name.data(),
                m, team.num_threads(), grid.row_tile, grid.col_tile, time.median * 1e6, time.best * 1e6,
                flop / time.median * 1e-9, flop / time.best * 1e-9, 100e-9 * flop / time.best / peak,
                static_cast<double>(shape.bytes(m)) / time.best * 1e-9);
    std::fflush(stdout);
    std::free(packed);
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
    std::printf("%-10s %5s %2s  %-10s %9s %9s    %8s %8s\n", "shape", "m", "t", "tile", "median", "best", "median",
                "best");
    for (const MatmulShape& shape : options.shapes) {
      if (!options.only.empty() && options.only != shape.name) continue;
      // Copies that exceed the last-level cache, as a step over many layers does.
      const std::vector<float> weights = random_floats(shape.n * shape.k);
      std::vector<PackedMatrix> copies;
      const int64_t num_copies = std::max<int64_t>(1, (int64_t{96} << 20) / shape.weight_bytes());
      for (int64_t i = 0; i < num_copies; ++i) copies.emplace_back(options.isa, weights, shape.n, shape.k);
      measure(options, team, shape, copies);
    }
  }
  return 0;
}

}  // namespace
}  // namespace blendserve

int main(int argc, char** argv) { return blendserve::run(blendserve::parse(argc, argv)); }
