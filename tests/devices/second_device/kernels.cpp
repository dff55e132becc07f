// Operators of the device "second". A few run later, in their stream; what is not here runs on the CPU's kernels over the device's
// bytes, once what its stream was given before is done.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_map>

namespace second {

namespace {

using at::Tensor;
using c10::IValue;

bool is_here(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSecond;
}

c10::Stream stream_for(const Tensor& tensor) {
  return current_stream(tensor.device().index());
}

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      has_float64() || (dtype != at::kDouble && dtype != at::kComplexDouble), "the device 'second' has no double precision");
}

// making

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> /*layout*/,
    std::optional<at::Device> device,
    std::optional<bool> /*pin_memory*/) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  c10::OptionalDeviceGuard guard(device.has_value() && device->has_index() ? device : std::nullopt);
  return at::detail::empty_strided_generic(size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> /*layout*/,
    std::optional<at::Device> device,
    std::optional<bool> /*pin_memory*/,
    std::optional<at::MemoryFormat> format) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  c10::OptionalDeviceGuard guard(device.has_value() && device->has_index() ? device : std::nullopt);
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

void grow(const Tensor& tensor, size_t num_bytes) {
  auto storage = tensor.storage();
  if (num_bytes > storage.nbytes()) {
    c10::DeviceGuard guard(tensor.device());
    c10::DataPtr made = allocator()->allocate(num_bytes);
    synchronize(stream_for(tensor));
    if (storage.nbytes() > 0) {
      std::memcpy(bytes_of(made.get()), bytes_of(storage.data()), storage.nbytes());
    }
    storage.set_data_ptr_noswap(std::move(made));
    storage.set_nbytes(num_bytes);
  }
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) {
    impl->set_sizes_contiguous(size);
    grow(self, (self.storage_offset() + self.numel()) * self.itemsize());
  }
  if (format.has_value()) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

Tensor& set_storage_at(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.itemsize();
  return set_storage_at(self, std::move(source), 0, {size}, {});
}

Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(), true);
  return set_storage_at(self, none, 0, {0}, {});
}

// kernels that run later; they hold no memory alive, as kernels do not

struct Strided {
  void* bytes;
  std::vector<int64_t> size, stride;
  at::ScalarType dtype;

  explicit Strided(const Tensor& tensor)
      : bytes(is_here(tensor) ? bytes_of(tensor.data_ptr()) : tensor.data_ptr()),
        size(tensor.sizes().vec()),
        stride(tensor.strides().vec()),
        dtype(tensor.scalar_type()) {}

  Tensor on_cpu() const {
    return at::from_blob(bytes, size, stride, at::TensorOptions(dtype));
  }
};

Tensor copy_from(const Tensor& source, const Tensor& to, bool non_blocking) {
  if (to.numel() == 0) {
    return to;
  }
  const auto from = (source.is_conj() || source.is_neg() ? source.resolve_conj().resolve_neg() : source).expand(to.sizes());
  auto stream = stream_for(is_here(to) ? to : from);
  submit(stream, [a = Strided(from), b = Strided(to)] { b.on_cpu().copy_(a.on_cpu()); });
  if ((is_here(from) && is_here(to)) || non_blocking) {
    return to;
  }
  synchronize(stream);
  return to;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& to) {
  to.resize_(source.sizes());
  return copy_from(source, to, false);
}

Tensor& fill_later(Tensor& self, const at::Scalar& value) {
  submit(stream_for(self), [a = Strided(self), value] { a.on_cpu().fill_(value); });
  return self;
}

Tensor& zero_later(Tensor& self) {
  return fill_later(self, 0);
}

Tensor mm(const Tensor& left, const Tensor& right) {
  TORCH_CHECK(left.dim() == 2 && right.dim() == 2, "mm: both must be matrices");
  TORCH_CHECK(left.size(1) == right.size(0), "mat1 and mat2 shapes cannot be multiplied (", left.size(0), "x", left.size(1), " and ", right.size(0), "x", right.size(1), ")");
  TORCH_CHECK(left.scalar_type() == right.scalar_type(), "expected m1 and m2 to have the same dtype, but got: ", left.dtype(), " != ", right.dtype());
  TORCH_CHECK(is_here(left) && is_here(right), "Expected all tensors to be on the same device, but found at least two devices, ", left.device(), " and ", right.device(), "!");
  auto made = at::empty({left.size(0), right.size(1)}, left.options());
  submit(stream_for(left), [a = Strided(left), b = Strided(right), c = Strided(made)] {
    auto to = c.on_cpu();
    at::mm_out(to, a.on_cpu(), b.on_cpu());
  });
  return made;
}

at::Scalar local_scalar(const Tensor& self) {
  synchronize(stream_for(self));
  return Strided(self).on_cpu().item();
}

// kernels of the CPU, over the device's bytes

class Visit {
 public:
  explicit Visit(c10::Device device) : device_(device) {}

  // A tensor of the CPU that shares its bytes with a tensor of the device; tensors that share a storage still do.
  Tensor there(const Tensor& tensor) {
    if (!is_here(tensor)) {
      return tensor;
    }
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) {
      c10::DataPtr bytes(bytes_of(tensor.storage().data()), c10::Device(c10::kCPU));
      c10::Storage shared(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(bytes), c10::GetCPUAllocator(), true);
      found = storages_.emplace(storage, shared).first;
      originals_.emplace(shared.unsafeGetStorageImpl(), tensor.storage());
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      impl->set_wrapped_number(true);
    }
    tensors_.emplace(impl, tensor);
    kept_.push_back(made);
    return made;
  }

  // What the CPU's kernel gave, on the device: the tensor that went there, a view of it, or a new one.
  Tensor back(const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != c10::kCPU || tensor.layout() != c10::kStrided) {
      return tensor;
    }
    auto same = tensors_.find(tensor.unsafeGetTensorImpl());
    if (same != tensors_.end()) {
      return same->second;
    }
    auto shared = originals_.find(tensor.storage().unsafeGetStorageImpl());
    if (shared != originals_.end()) {
      auto view = at::empty({0}, tensor.options().device(device_));
      view.set_(shared->second, tensor.storage_offset(), tensor.sizes(), tensor.strides());
      return view;
    }
    auto made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device_).pinned_memory(false));
    if (tensor.numel() > 0) {
      std::memcpy(bytes_of(made.data_ptr()), tensor.data_ptr(), made.storage().nbytes());
    }
    return made;
  }

  // Where a kernel has resized what it was to write, the device's tensor is resized too.
  void settle() {
    for (const auto& kept : kept_) {
      const auto& tensor = tensors_.at(kept.unsafeGetTensorImpl());
      bool is_moved = kept.storage().data() != bytes_of(tensor.storage().data());
      if (kept.sizes() != tensor.sizes() || is_moved) {
        grow(tensor, kept.storage().nbytes());
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(kept.sizes(), kept.strides(), kept.storage_offset());
        if (is_moved && kept.storage().nbytes() > 0) {
          std::memcpy(bytes_of(tensor.storage().data()), kept.storage().data(), kept.storage().nbytes());
        }
      }
    }
  }

 private:
  c10::Device device_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_; // of the device → of the CPU
  std::unordered_map<c10::StorageImpl*, c10::Storage> originals_; // of the CPU → of the device
  std::unordered_map<c10::TensorImpl*, Tensor> tensors_;
  std::vector<Tensor> kept_;
};

c10::Device device_among(const std::vector<IValue>& values) {
  for (const auto& value : values) {
    if (value.isTensor() && is_here(value.toTensor())) {
      return value.toTensor().device();
    }
    if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) {
        if (is_here(tensor)) {
          return tensor.device();
        }
      }
    }
    if (value.isDevice() && value.toDevice().type() == kSecond && value.toDevice().has_index()) {
      return value.toDevice();
    }
  }
  return c10::Device(kSecond, current_device());
}

void check_same_device(const c10::OperatorHandle& op, const std::vector<IValue>& values, c10::Device device) {
  bool is_copy = op.schema().name().find("copy") != std::string::npos || op.schema().name().find("index") != std::string::npos;
  for (const auto& value : values) {
    if (!is_copy && value.isTensor() && value.toTensor().defined()) {
      const auto& tensor = value.toTensor();
      TORCH_CHECK(
          tensor.device() == device || (tensor.device().is_cpu() && tensor.dim() == 0),
          "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ", tensor.device(), "!");
    }
  }
}

IValue going(const IValue& value, Visit& visit, c10::Device device) {
  if (value.isTensor()) {
    return visit.there(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) {
      list.push_back(visit.there(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor.has_value() ? std::optional<Tensor>(visit.there(*tensor)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kSecond) {
    return c10::Device(c10::kCPU);
  }
  if (value.isGenerator()) {
    return drawing_generator(value.toGenerator());
  }
  return value;
}

IValue coming(const IValue& value, Visit& visit) {
  if (value.isTensor()) {
    return visit.back(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) {
      list.push_back(visit.back(tensor));
    }
    return list;
  }
  return value;
}

// While it lives, what draws from the CPU's generator draws from the device's.
struct Drawing {
  explicit Drawing(int device) : mine(drawing_generator(default_generator(device))), cpus(at::detail::getDefaultCPUGenerator()) {
    before = cpus.get_state();
    cpus.set_state(mine.get_state());
  }
  ~Drawing() {
    mine.set_state(cpus.get_state());
    cpus.set_state(before);
  }
  at::Generator mine, cpus;
  Tensor before;
};

void on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto num_arguments = schema.arguments().size();
  auto values = torch::jit::pop(*stack, num_arguments);
  auto device = device_among(values);
  check_same_device(op, values, device);
  c10::DeviceGuard guard(device);
  synchronize(current_stream(device.index()));
  Visit visit(device);
  for (const auto& value : values) {
    torch::jit::push(*stack, going(value, visit, device));
  }
  if (op.hasTag(at::Tag::nondeterministic_seeded)) {
    Drawing drawing(device.index());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  } else {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  visit.settle();
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (const auto& result : results) {
    torch::jit::push(*stack, coming(result, visit));
  }
}

Tensor convolution(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  synchronize(stream_for(input));
  Visit visit(input.device());
  auto there = bias.has_value() ? std::optional<Tensor>(visit.there(*bias)) : std::nullopt;
  return visit.back(at::convolution_symint(
      visit.there(input), visit.there(weight), there, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad,
    const Tensor& input,
    const Tensor& weight,
    c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation,
    bool transposed,
    c10::SymIntArrayRef output_padding,
    c10::SymInt groups,
    std::array<bool, 3> mask) {
  synchronize(stream_for(input));
  Visit visit(input.device());
  auto bias_sizes = std::vector<c10::SymInt>{transposed ? grad.sym_size(1) : weight.sym_size(0)};
  auto found = at::convolution_backward_symint(
      visit.there(grad), visit.there(input), visit.there(weight), bias_sizes, stride, padding, dilation, transposed,
      output_padding, groups, mask);
  return {visit.back(std::get<0>(found)), visit.back(std::get<1>(found)), visit.back(std::get<2>(found))};
}

int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

void record(Tensor& self, c10::Stream stream) {
  record_stream(self.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_storage_at);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_", set_nothing);
  library.impl("view", TORCH_FN(static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(at::native::view)));
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("_reshape_alias", TORCH_FN(static_cast<Tensor (*)(const Tensor&, at::IntArrayRef, at::IntArrayRef)>(at::native::_reshape_alias)));
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("fill_.Scalar", fill_later);
  library.impl("zero_", zero_later);
  library.impl("mm", mm);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("_fused_sdp_choice", plain_attention);
  library.impl("record_stream", record);
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward"}) { // else torch composes them of others
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
}

// autocast

template <bool is_lower>
void cast_first(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  auto dtype = is_lower ? at::autocast::get_lower_precision_fp_from_device_type(kSecond) : at::kFloat;
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor() && value.toTensor().defined()) {
      const_cast<IValue&>(value) = at::autocast::cached_cast(dtype, value.toTensor(), kSecond);
    }
  }
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  for (const char* name : {"mm", "matmul", "bmm", "addmm", "baddbmm", "linear", "conv1d", "conv2d", "conv3d", "_convolution",
                           "scaled_dot_product_attention", "mv"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_first<true>>());
  }
  for (const char* name : {"softmax.int", "log_softmax.int", "layer_norm", "mse_loss", "nll_loss", "cross_entropy_loss", "exp",
                           "log", "norm.Scalar", "sum", "sum.dim_IntList", "cumsum", "binary_cross_entropy_with_logits"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_first<false>>());
  }
}

} // namespace

} // namespace second
