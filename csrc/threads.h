// A fixed team of worker threads that runs tiles of one op at a time.
// Knows nothing of models; the caller decides what a tile is.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace blendserve {

// A borrowed callable: void(int64_t tile, int worker). Lives only as long as the call it is passed to.
class TileFn {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TileFn>)
  TileFn(F&& f)  // NOLINT(google-explicit-constructor): call sites pass lambdas
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, int64_t tile, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(object))(tile, worker);
        }) {}
  void operator()(int64_t tile, int worker) const { call_(object_, tile, worker); }

 private:
  void* object_;
  void (*call_)(void*, int64_t, int);
};

class ThreadTeam {
 public:
  // num_threads >= 1, the calling thread included. Throws std::invalid_argument where the system has not so many.
  explicit ThreadTeam(int num_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int num_threads() const;
  // Pauses that a thread of the team makes before it sleeps.
  int spins() const;
  // Runs fn(tile, worker) once for every tile in [0, num_tiles); returns when all are done. Tiles are claimed one by
  // one from a shared counter, in rising order; `worker` is in [0, num_threads), 0 is the calling thread. At most 2^32
  // - 1 tiles. Never allocates. Must not be called from inside a tile nor by two threads at once; a tile that throws
  // terminates the process, since the others cannot be taken back.
  void run(int64_t num_tiles, TileFn fn) noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace blendserve
