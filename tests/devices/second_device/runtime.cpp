// Streams, memory and generators of the device "second".
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace second {

namespace {

int number_of(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr ? otherwise : std::atoi(value);
}

} // namespace

int num_devices() {
  static const int count = number_of("SECOND_DEVICE_COUNT", 1);
  return count;
}

bool has_float64() {
  static const bool has = number_of("SECOND_DEVICE_FLOAT64", 1) != 0;
  return has;
}

// streams

namespace {

struct Queue {
  std::deque<Work> works;
};

// One lock for all queues and moments: they are few, and their order is what matters. Never destroyed: threads outlive main().
struct Streams {
  std::mutex lock;
  std::condition_variable changed;
  std::map<std::pair<int, int64_t>, Queue> queues;
  std::string error;
  int64_t last_id = 0;
};

Streams& streams() {
  static auto* all = new Streams();
  return *all;
}

thread_local int this_device = 0;
thread_local std::map<int, int64_t> this_stream;

c10::Stream stream_of(int device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSecond, device), id);
}

void serve(Queue& queue) {
  auto& all = streams();
  std::unique_lock<std::mutex> held(all.lock);
  while (true) {
    all.changed.wait(held, [&] { return !queue.works.empty(); });
    Work work = std::move(queue.works.front());
    queue.works.pop_front();
    held.unlock();
    std::string error;
    try {
      work();
    } catch (const std::exception& failed) {
      error = failed.what();
    }
    held.lock();
    if (!error.empty()) {
      all.error = error;
    }
    all.changed.notify_all();
  }
}

// What a kernel that ran later found wrong is said where the host waits for it, as CUDA does.
void raise_pending(std::unique_lock<std::mutex>& held) {
  std::string error = std::exchange(streams().error, "");
  held.unlock();
  TORCH_CHECK(error.empty(), "second: a kernel failed: ", error);
}

} // namespace

int current_device() {
  return this_device;
}

void set_device(int device) {
  TORCH_CHECK(device >= 0 && device < num_devices(), "second: invalid device ordinal ", device, " of ", num_devices());
  this_device = device;
}

c10::Stream current_stream(int device) {
  device = device < 0 ? this_device : device;
  auto found = this_stream.find(device);
  return stream_of(device, found == this_stream.end() ? 0 : found->second);
}

c10::Stream exchange_stream(c10::Stream stream) {
  auto before = current_stream(stream.device_index());
  this_stream[stream.device_index()] = stream.id();
  return before;
}

c10::Stream new_stream(int device) {
  std::lock_guard<std::mutex> held(streams().lock);
  return stream_of(device < 0 ? this_device : device, ++streams().last_id);
}

void submit(c10::Stream stream, Work work) {
  auto& all = streams();
  std::lock_guard<std::mutex> held(all.lock);
  auto [place, is_new] = all.queues.try_emplace({stream.device_index(), stream.id()});
  place->second.works.push_back(std::move(work));
  if (is_new) {
    std::thread(serve, std::ref(place->second)).detach();
  }
  all.changed.notify_all();
}

MomentPtr mark(c10::Stream stream) {
  auto moment = std::make_shared<Moment>();
  submit(stream, [moment] {
    std::lock_guard<std::mutex> held(streams().lock);
    moment->is_reached = true;
    moment->time = std::chrono::steady_clock::now();
    streams().changed.notify_all();
  });
  return moment;
}

void wait_in(c10::Stream stream, MomentPtr moment) {
  submit(stream, [moment] {
    std::unique_lock<std::mutex> held(streams().lock);
    streams().changed.wait(held, [&] { return moment->is_reached; });
  });
}

void wait(const MomentPtr& moment) {
  std::unique_lock<std::mutex> held(streams().lock);
  streams().changed.wait(held, [&] { return moment->is_reached; });
  raise_pending(held);
}

bool is_reached(const MomentPtr& moment) {
  std::lock_guard<std::mutex> held(streams().lock);
  return moment->is_reached;
}

void synchronize(c10::Stream stream) {
  wait(mark(stream));
}

void synchronize_device(int device) {
  std::vector<c10::Stream> all;
  {
    std::lock_guard<std::mutex> held(streams().lock);
    for (const auto& [place, queue] : streams().queues) {
      if (place.first == (device < 0 ? this_device : device)) {
        all.push_back(stream_of(place.first, place.second));
      }
    }
  }
  for (auto stream : all) {
    synchronize(stream);
  }
}

// memory

namespace {

constexpr size_t kSpace = size_t(8) << 30; // of addresses, for all devices
constexpr size_t kMemory = size_t(2) << 30; // of each device
constexpr size_t kRound = 512;

struct Block {
  char* address;
  size_t size;
  int device;
  int64_t stream; // the one that it was given out for, which may use it again at once
  std::set<int64_t> others; // that use it too
};

// Blocks that were given back stay with their stream until empty_cache, as in CUDA's allocator.
struct Heap {
  std::mutex lock;
  char* addresses = nullptr;
  char* bytes = nullptr;
  size_t used = 0;
  std::multimap<size_t, char*> unused;
  std::map<std::pair<int, int64_t>, std::multimap<size_t, char*>> cached;
  std::unordered_map<const void*, Block*> blocks;
  std::set<std::pair<const char*, size_t>> pinned;
  std::vector<c10::CachingDeviceAllocator::DeviceStats> stats;

  Heap() : stats(num_devices()) {
    auto reserve = [](int protection) {
      void* found = mmap(nullptr, kSpace, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(found != MAP_FAILED, "second: no addresses for its memory");
      return static_cast<char*>(found);
    };
    addresses = reserve(PROT_NONE);
    bytes = reserve(PROT_READ | PROT_WRITE);
  }
};

Heap& heap() {
  static auto* all = new Heap();
  return *all;
}

char* take(std::multimap<size_t, char*>& blocks, size_t size) {
  auto found = blocks.find(size);
  if (found == blocks.end()) {
    return nullptr;
  }
  char* address = found->second;
  blocks.erase(found);
  return address;
}

void give_back_now(Block* block) { // with the lock held
  auto& all = heap();
  all.cached[{block->device, block->stream}].emplace(block->size, block->address);
  all.stats[block->device].active_bytes[0].decrease(block->size);
  delete block;
}

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  std::unique_lock<std::mutex> held(heap().lock);
  heap().blocks.erase(block->address);
  heap().stats[block->device].allocated_bytes[0].decrease(block->size);
  heap().stats[block->device].allocation[0].decrease(1);
  if (block->others.empty()) {
    give_back_now(block);
    return;
  }
  auto left = std::make_shared<int>(block->others.size());
  auto [device, others] = std::pair(block->device, block->others); // the last of them deletes the block
  held.unlock();
  for (auto stream : others) {
    submit(stream_of(device, stream), [block, left] {
      std::lock_guard<std::mutex> held(heap().lock);
      if (--*left == 0) {
        give_back_now(block);
      }
    });
  }
}

Block* give_out(size_t num_bytes, int device) {
  auto& all = heap();
  size_t size = (num_bytes + kRound - 1) / kRound * kRound;
  int64_t stream = current_stream(device).id();
  std::lock_guard<std::mutex> held(all.lock);
  auto& stats = all.stats[device];
  char* address = take(all.cached[{device, stream}], size);
  if (address == nullptr) {
    if (stats.reserved_bytes[0].current + int64_t(size) > int64_t(kMemory)) {
      stats.num_ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "second out of memory. Tried to allocate ", num_bytes, " bytes.");
    }
    address = take(all.unused, size);
    if (address == nullptr) {
      TORCH_CHECK_WITH(OutOfMemoryError, all.used + size <= kSpace, "second out of memory: it has no more addresses");
      address = all.addresses + all.used;
      all.used += size;
    }
    stats.reserved_bytes[0].increase(size);
    stats.segment[0].increase(1);
  }
  stats.allocated_bytes[0].increase(size);
  stats.active_bytes[0].increase(size);
  stats.requested_bytes[0].increase(num_bytes);
  stats.allocation[0].increase(1);
  auto* block = new Block{address, size, device, stream, {}};
  all.blocks[address] = block;
  return block;
}

#if TORCH_VERSION_MINOR >= 9
using Base = c10::DeviceAllocator;
#define OF_BASE override
#else
using Base = c10::Allocator;
#define OF_BASE
#endif

struct Allocator final : Base {
  c10::DataPtr allocate(size_t num_bytes) override {
    c10::Device device(kSecond, current_device());
    if (num_bytes == 0) {
      return {nullptr, nullptr, &give_back_nothing, device};
    }
    auto* block = give_out(num_bytes, device.index());
    return {block->address, block, &give_back, device};
  }
  static void give_back_nothing(void* /*context*/) {}
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t count) const final {
    synchronize_device(-1);
    std::memcpy(bytes_of(to), bytes_of(from), count);
  }
#if TORCH_VERSION_MINOR >= 9
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t /*pool*/ = {0, 0}) override {
    empty_cache();
  }
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    record_stream(pointer, stream);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return statistics(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex /*device*/) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    reset_peak(device);
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return free_and_total(device);
  }
#endif
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    char* bytes = static_cast<char*>(std::malloc(num_bytes));
    std::lock_guard<std::mutex> held(heap().lock);
    heap().pinned.insert({bytes, num_bytes});
    return {bytes, bytes, &unpin, c10::Device(c10::kCPU)};
  }
  static void unpin(void* context) {
    auto* bytes = static_cast<char*>(context);
    {
      std::lock_guard<std::mutex> held(heap().lock);
      auto found = heap().pinned.lower_bound({bytes, 0});
      heap().pinned.erase(found);
    }
    std::free(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }
  void copy_data(void* to, const void* from, std::size_t count) const final {
    std::memcpy(to, from, count);
  }
};

Allocator the_allocator;
PinnedAllocator the_pinned_allocator;
const auto registered_allocator = (c10::SetAllocator(kSecond, &the_allocator), true);

} // namespace

void* bytes_of(const void* address) {
  auto* found = static_cast<const char*>(address);
  return found == nullptr ? nullptr : heap().bytes + (found - heap().addresses);
}

bool is_address(const void* address) {
  return address >= heap().addresses && address < heap().addresses + kSpace;
}

c10::Allocator* allocator() {
  return &the_allocator;
}

c10::Allocator* pinned_allocator() {
  return &the_pinned_allocator;
}

bool is_pinned(const void* address) {
  auto* byte = static_cast<const char*>(address);
  std::lock_guard<std::mutex> held(heap().lock);
  for (const auto& [begin, size] : heap().pinned) {
    if (byte >= begin && byte < begin + size) {
      return true;
    }
  }
  return false;
}

void empty_cache() {
  for (int device = 0; device < num_devices(); device++) {
    synchronize_device(device);
  }
  auto& all = heap();
  std::lock_guard<std::mutex> held(all.lock);
  for (auto& [place, blocks] : all.cached) {
    for (auto [size, address] : blocks) {
      madvise(bytes_of(address), size, MADV_DONTNEED);
      all.unused.emplace(size, address);
      all.stats[place.first].reserved_bytes[0].decrease(size);
    }
    blocks.clear();
  }
}

void record_stream(const c10::DataPtr& pointer, c10::Stream stream) {
  std::lock_guard<std::mutex> held(heap().lock);
  auto found = heap().blocks.find(pointer.get());
  if (found != heap().blocks.end() && found->second->stream != stream.id()) {
    found->second->others.insert(stream.id());
  }
}

c10::CachingDeviceAllocator::DeviceStats statistics(int device) {
  std::lock_guard<std::mutex> held(heap().lock);
  return heap().stats.at(device < 0 ? this_device : device);
}

void reset_peak(int device) {
  std::lock_guard<std::mutex> held(heap().lock);
  auto& stats = heap().stats.at(device < 0 ? this_device : device);
  for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.allocation}) {
    (*stat)[0].reset_peak();
  }
}

std::pair<size_t, size_t> free_and_total(int device) {
  return {kMemory - statistics(device).reserved_bytes[0].current, kMemory};
}

// random numbers: the CPU's algorithm, with a state of its own for each device

namespace {

struct SecondGenerator final : c10::GeneratorImpl {
  explicit SecondGenerator(int device, at::Generator drawing)
      : GeneratorImpl(c10::Device(kSecond, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        drawing(std::move(drawing)) {}

  void set_current_seed(uint64_t seed) override {
    drawing.set_current_seed(seed);
  }
  void set_offset(uint64_t /*offset*/) override {
    TORCH_CHECK(false, "second: its generator has no offset");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "second: its generator has no offset");
  }
  uint64_t current_seed() const override {
    return drawing.current_seed();
  }
  uint64_t seed() override {
    return drawing.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    drawing.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return drawing.unsafeGetGeneratorImpl()->get_state();
  }
  SecondGenerator* clone_impl() const override {
    return new SecondGenerator(device().index(), drawing.clone());
  }

  at::Generator drawing;
};

} // namespace

at::Generator new_generator(int device) {
  return at::make_generator<SecondGenerator>(device < 0 ? this_device : device, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(int device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (int index = 0; index < num_devices(); index++) {
      made->push_back(new_generator(index));
    }
    return made;
  }();
  return all->at(device < 0 ? this_device : device);
}

const at::Generator& drawing_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kSecond, "Expected a 'second' device type for generator but found '", generator.device().type(), "'");
  return static_cast<SecondGenerator*>(generator.unsafeGetGeneratorImpl())->drawing;
}

// what torch asks

namespace {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kSecond;
  }
  c10::Device getDevice() const override {
    return c10::Device(kSecond, current_device());
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    set_device(device.index() < 0 ? current_device() : device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < num_devices()) {
      set_device(device.index());
    }
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return num_devices();
  }
  c10::Stream getStream(c10::Device device) const override {
    return current_stream(device.index());
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(device.index() < 0 ? current_device() : device.index(), 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*is_urgent*/ = false) const override {
    return new_stream(device.index());
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/ = 0) const override {
    return new_stream(device.index());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return exchange_stream(stream);
  }
  bool queryStream(const c10::Stream& stream) const override {
    auto moment = mark(stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return is_reached(moment);
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(stream);
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    synchronize_device(device);
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex /*device*/, c10::EventFlag /*flag*/) const override {
    auto* held = static_cast<MomentPtr*>(*event);
    if (held == nullptr) {
      *event = held = new MomentPtr();
    }
    *held = mark(stream);
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) {
      wait_in(stream, *static_cast<MomentPtr*>(event));
    }
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || is_reached(*static_cast<MomentPtr*>(event));
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      wait(*static_cast<MomentPtr*>(event));
    }
  }
  void destroyEvent(void* event, c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<MomentPtr*>(event);
  }
  double elapsedTime(void* begin, void* end, c10::DeviceIndex /*device*/) const override {
    auto& from = *static_cast<MomentPtr*>(begin);
    auto& to = *static_cast<MomentPtr*>(end);
    TORCH_CHECK(is_reached(from) && is_reached(to), "second: both events must be completed before their time is asked");
    return std::chrono::duration<double, std::milli>(to->time - from->time).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    record_stream(pointer, stream);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return num_devices() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override {
    return true;
  }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override {
    return num_devices();
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    set_device(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_device();
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    auto before = getCurrentDevice();
    set_device(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* address) const override {
    return is_pinned(address);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  c10::Device getDeviceFromPtr(void* address) const override {
    TORCH_CHECK(is_address(address), "second: that is no address of its");
    return c10::Device(kSecond, 0);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return new_generator(device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    c10::Storage mutable_storage = storage;
    c10::DataPtr made = the_allocator.allocate(num_bytes);
    synchronize_device(-1);
    std::memcpy(bytes_of(made.get()), bytes_of(storage.data()), std::min(num_bytes, storage.nbytes()));
    mutable_storage.set_data_ptr_noswap(std::move(made));
    mutable_storage.set_nbytes(num_bytes);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
const auto registered_hooks = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// What a program says to the device itself; `torch.second` (second_device.py) gives it names.
TORCH_LIBRARY(second_device, library) {
  library.def("sleep", [](int64_t milliseconds) {
    submit(current_stream(-1), [milliseconds] { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); });
  });
  library.def("num_devices", [] { return int64_t(num_devices()); });
  library.def("current_device", [] { return int64_t(current_device()); });
  library.def("set_device", [](int64_t device) { set_device(device); });
  library.def("synchronize", [](int64_t device) { synchronize_device(device); });
  library.def("default_generator", [](int64_t device) { return default_generator(device); });
  library.def("empty_cache", [] { empty_cache(); });
  library.def("reset_peak", [](int64_t device) { reset_peak(device); });
  library.def("memory", [](int64_t device) {
    auto found = statistics(device);
    std::vector<int64_t> figures;
    for (const auto* stat : {&found.allocated_bytes, &found.reserved_bytes, &found.allocation}) {
      figures.insert(figures.end(), {(*stat)[0].current, (*stat)[0].peak, (*stat)[0].allocated, (*stat)[0].freed});
    }
    auto [available, total] = free_and_total(device);
    figures.insert(figures.end(), {int64_t(available), int64_t(total)});
    return figures;
  });
}

} // namespace

} // namespace second
