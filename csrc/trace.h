// What each worker did when: spans of the tiles of one op, recorded where tiles are run.
// Off at first, when it costs the caller one branch. Knows nothing of ops, queues or files.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

namespace blendserve {

// Tiles of one op that a worker ran one after the other: from the beginning of the first to the end of the last, of
// which it was at work for `busy_ns`. Times are those of the steady clock.
struct TraceSpan {
  int32_t op;
  int32_t layer;
  int32_t nano_batch;
  int64_t begin_ns;
  int64_t end_ns;
  int64_t busy_ns;
};

class TraceRecorder {
 public:
  // Keeps the first `max_spans` spans of each worker; memory is taken when recording first starts.
  TraceRecorder(int num_workers, int64_t max_spans);

  // Between steps only: forget what was recorded, and record from now on or no more.
  void start();
  void stop() { is_on_ = false; }
  bool is_on() const { return is_on_; }

  // A tile that `worker` has run. To be called by that worker, while recording is on. Never allocates.
  void record(int worker, int32_t op, int32_t layer, int32_t nano_batch, int64_t begin_ns, int64_t end_ns);

  // Between steps only. Spans of a worker in the order of their beginnings, and how many more found no room.
  int num_workers() const { return static_cast<int>(workers_.size()); }
  std::span<const TraceSpan> spans(int worker) const { return workers_[static_cast<size_t>(worker)].spans; }
  int64_t num_lost() const;

  static int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

 private:
  struct alignas(64) Worker {
    std::vector<TraceSpan> spans;
    int64_t num_lost = 0;
  };

  bool is_on_ = false;
  size_t max_spans_;
  std::vector<Worker> workers_;
};

}  // namespace blendserve
