// Spans of what workers did: tiles of one op merge, others do not, and what does not fit is counted.
#include <vector>

#include "check.h"
#include "threads.h"
#include "trace.h"

namespace blendserve {
namespace {

void tiles_of_one_op_merge() {
  TraceRecorder trace(2, 8);
  CHECK(!trace.is_on());
  trace.start();
  CHECK(trace.is_on());
  trace.record(0, 3, 1, 0, 100, 110);
  trace.record(0, 3, 1, 0, 115, 125);
  trace.record(0, 3, 2, 0, 130, 140);  // another layer
  trace.record(0, 3, 2, 1, 140, 150);  // another nano-batch
  trace.record(0, 4, 2, 1, 150, 160);  // another op
  trace.record(0, 3, 1, 0, 160, 170);  // the first again, but not right after
  trace.record(1, 3, 1, 0, 105, 120);
  const auto spans = trace.spans(0);
  CHECK(spans.size() == 5 && trace.spans(1).size() == 1 && trace.num_lost() == 0);
  CHECK(spans[0].begin_ns == 100 && spans[0].end_ns == 125 && spans[0].busy_ns == 20);
  CHECK(spans[1].layer == 2 && spans[2].nano_batch == 1 && spans[3].op == 4 && spans[4].begin_ns == 160);
  trace.start();
  CHECK(trace.spans(0).empty() && trace.spans(1).empty());
  trace.stop();
  CHECK(!trace.is_on());
}

void what_finds_no_room_is_counted() {
  TraceRecorder trace(1, 2);
  trace.start();
  for (int32_t op = 0; op < 5; ++op) trace.record(0, op, 0, 0, 10 * op, 10 * op + 5);
  trace.record(0, 1, 0, 0, 90, 95);  // like the last that was kept, but others came between
  CHECK(trace.spans(0).size() == 2 && trace.spans(0)[1].end_ns == 15 && trace.num_lost() == 4);
  trace.start();
  CHECK(trace.num_lost() == 0);
}

void workers_record_side_by_side() {
  constexpr int kThreads = 4;
  constexpr int64_t kTiles = 200;
  ThreadTeam team(kThreads);
  TraceRecorder trace(kThreads, kTiles);
  for (int round = 0; round < 20; ++round) {
    trace.start();
    team.run(kTiles, [&](int64_t tile, int worker) {
      const int64_t begin = TraceRecorder::now_ns();
      trace.record(worker, static_cast<int32_t>(tile), 0, 0, begin, TraceRecorder::now_ns());
    });
    std::vector<int> times_seen(kTiles);
    for (int worker = 0; worker < trace.num_workers(); ++worker) {
      int64_t at = 0;
      for (const TraceSpan& span : trace.spans(worker)) {
        ++times_seen[static_cast<size_t>(span.op)];
        CHECK(span.begin_ns >= at && span.end_ns >= span.begin_ns);
        at = span.end_ns;
      }
    }
    for (const int times : times_seen) CHECK(times == 1);
  }
}

}  // namespace
}  // namespace blendserve

int main() {
  using namespace blendserve;
  RUN(tiles_of_one_op_merge);
  RUN(what_finds_no_room_is_counted);
  RUN(workers_record_side_by_side);
}
