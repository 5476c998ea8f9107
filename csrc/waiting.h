// Waiting for an atomic value: awake for a while, then asleep.
#pragma once

#include <atomic>

namespace blendserve {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done(value of atom) holds: awake for `spins` pauses, then asleep; who changes the value notifies.
template <class T, class Done>
T wait_until(std::atomic<T>& atom, int spins, Done done) {
  T value = atom.load(std::memory_order_acquire);
  for (int i = 0; i < spins && !done(value); ++i) {
    pause_briefly();
    value = atom.load(std::memory_order_acquire);
  }
  while (!done(value)) {
    atom.wait(value, std::memory_order_acquire);
    value = atom.load(std::memory_order_acquire);
  }
  return value;
}

}  // namespace blendserve
