// Counts the bytes of tensors that live on the CPU, whichever thread makes or frees them: an allocator around PyTorch's.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {

std::mutex guard;
std::unordered_map<void*, int64_t> sizes;
int64_t live = 0;
int64_t most = 0;

void release(void* data) {
  if (data == nullptr) {
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = sizes.find(data);
    live -= found->second;
    sizes.erase(found);
  }
  c10::GetDefaultCPUAllocator()->raw_deallocate(data);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    if (data != nullptr) {
      const std::lock_guard<std::mutex> lock(guard);
      sizes[data] = static_cast<int64_t>(bytes);
      live += static_cast<int64_t>(bytes);
      most = std::max(most, live);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Counting counting;

}  // namespace

extern "C" {

void install() {
  c10::SetCPUAllocator(&counting, 200);
}

int64_t peak() {
  const std::lock_guard<std::mutex> lock(guard);
  return most;
}

void forget_peak() {
  const std::lock_guard<std::mutex> lock(guard);
  most = live;
}
}
