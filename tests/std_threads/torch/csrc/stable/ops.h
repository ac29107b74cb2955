// PyTorch's parallel_for on std::thread, for csrc/cpu/dispatch.cpp under ThreadSanitizer, which
// knows nothing of the barriers in PyTorch's own (OpenMP's) and would report races where there are
// none.
//
// With STD_THREADS_OVERLAP=1 each thread does the first item of the next one's share too: a race,
// which must be reported.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace torch::stable {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  static const bool overlap = std::getenv("STD_THREADS_OVERLAP");
  const int64_t n = end - begin, share = std::max((n + 3) / 4, grain);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share)
    threads.emplace_back([=, &f] { f(first, std::min(end, first + share + overlap)); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
