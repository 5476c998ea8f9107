// The whole test framework: a check that says where and what, and a runner that names the tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace blendserve::test {

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const char* condition, const Parts&... parts) {
  std::ostringstream message;
  static_cast<void>((message << ... << parts));
  std::fprintf(stderr, "%s:%d: check failed: %s %s\n", file, line, condition, message.str().c_str());
  std::exit(1);
}

template <class Exception, class F>
bool throws(F&& f) {
  try {
    f();
  } catch (const Exception&) {
    return true;
  }
  return false;
}

// A small generator with the same values on every machine: floats in [-1, 1).
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    return state_ ^= state_ << 5;
  }
  float unit() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }

 private:
  uint32_t state_;
};

}  // namespace blendserve::test

// CHECK(condition, parts of a message...)
#define CHECK(condition, ...)            \
  (static_cast<bool>(condition) ? void() \
                                : blendserve::test::fail(__FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__))
#define RUN(test) (std::printf("%s\n", #test), std::fflush(stdout), test())
