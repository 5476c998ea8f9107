#include "trace.h"

namespace blendserve {

TraceRecorder::TraceRecorder(int num_workers, int64_t max_spans)
    : max_spans_(static_cast<size_t>(max_spans)), workers_(static_cast<size_t>(num_workers)) {}

void TraceRecorder::start() {
  for (Worker& worker : workers_) {
    worker.spans.clear();
    worker.spans.reserve(max_spans_);
    worker.num_lost = 0;
  }
  is_on_ = true;
}

void TraceRecorder::record(int worker, int32_t op, int32_t layer, int32_t nano_batch, int64_t begin_ns,
                           int64_t end_ns) {
  Worker& mine = workers_[static_cast<size_t>(worker)];
  if (!mine.spans.empty()) {
    TraceSpan& last = mine.spans.back();
    if (last.op == op && last.layer == layer && last.nano_batch == nano_batch && mine.num_lost == 0) {
      last.end_ns = end_ns;
      last.busy_ns += end_ns - begin_ns;
      return;
    }
  }
  if (mine.spans.size() == max_spans_) {
    ++mine.num_lost;
    return;
  }
  mine.spans.push_back({op, layer, nano_batch, begin_ns, end_ns, end_ns - begin_ns});
}

int64_t TraceRecorder::num_lost() const {
  int64_t count = 0;
  for (const Worker& worker : workers_) count += worker.num_lost;
  return count;
}

}  // namespace blendserve
