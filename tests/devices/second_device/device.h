// The device "second": what its memory, its streams and its kernels tell each other. It runs on a CPU, and nothing of it is the CPU's:
// its addresses cannot be read by the host, its work is done later, by threads of its own, its random numbers are its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Stream.h>
#include <torch/version.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

namespace second {

constexpr c10::DeviceType kSecond = c10::DeviceType::PrivateUse1;

int num_devices(); // as many as SECOND_DEVICE_COUNT says, 1 without it
bool has_float64(); // not where SECOND_DEVICE_FLOAT64 is 0

// streams: one thread each, which does what it is given in that order

using Work = std::function<void()>;

struct Moment { // a place in the order of a stream; what an event stands for
  bool is_reached = false;
  std::chrono::steady_clock::time_point time;
};
using MomentPtr = std::shared_ptr<Moment>;

int current_device();
void set_device(int device);
c10::Stream current_stream(int device);
c10::Stream exchange_stream(c10::Stream stream);
c10::Stream new_stream(int device);
void submit(c10::Stream stream, Work work);
MomentPtr mark(c10::Stream stream);
void wait_in(c10::Stream stream, MomentPtr moment); // the stream waits, the host goes on
void wait(const MomentPtr& moment); // the host waits
bool is_reached(const MomentPtr& moment);
void synchronize(c10::Stream stream);
void synchronize_device(int device);

// memory: an address of the device, and where its kernels find those bytes

void* bytes_of(const void* address);
bool is_address(const void* address);
c10::Allocator* allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* address);
void empty_cache();
void record_stream(const c10::DataPtr& pointer, c10::Stream stream);
c10::CachingDeviceAllocator::DeviceStats statistics(int device);
void reset_peak(int device);
std::pair<size_t, size_t> free_and_total(int device);

// random numbers

const at::Generator& default_generator(int device);
at::Generator new_generator(int device);
const at::Generator& drawing_generator(const at::Generator& generator); // the CPU's generator that draws for it

} // namespace second
