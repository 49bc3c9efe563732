// Errors made on purpose: a build whose sanitizer does not report them checks nothing.

#include <cstdint>
#include <thread>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int atp_fault_heap(int size) {
  volatile int* values = new int[size];
  return values[size];  // the first element behind them
}

EXPORTED int64_t atp_fault_overflow(int64_t value) {
  return value * value;
}

EXPORTED int atp_fault_race(int rounds) {
  int count = 0;
  std::thread other([&] {
    for (int i = 0; i < rounds; ++i) ++count;
  });
  for (int i = 0; i < rounds; ++i) ++count;
  other.join();
  return count;
}
