// A device in main memory with real values and CUDA's rule that the tensors of one call lie on one device.
//
// It is PyTorch's backend PrivateUse1. Kernels are the CPU's, on copies or aliases of the same memory. As on CUDA,
// 0-dim CPU tensors may take part in a call and CPU tensors may index; any other mixture is an error. Without float64,
// as on Apple's mps, no tensor of it can be made.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorIndexing.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

using namespace at;
using c10::Stream;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr c10::DeviceType STRICT = c10::DeviceType::PrivateUse1;
bool has_float64 = true;

// One device with one stream -----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = STRICT;
  static Stream stream() { return Stream(Stream::DEFAULT, c10::Device(STRICT, 0)); }
  c10::DeviceType type() const override { return STRICT; }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(STRICT, 0); }
  c10::Device getDevice() const override { return c10::Device(STRICT, 0); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  Stream getStream(c10::Device) const noexcept override { return stream(); }
  Stream getNewStream(c10::Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const DeviceIndex) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Allocator final : c10::Allocator {
  static void release(void* memory) {
    if (memory) c10::free_cpu(memory);
  }
  DataPtr allocate(size_t size) override {
    void* memory = size ? c10::alloc_cpu(size) : nullptr;
    return {memory, memory, &release, Device(STRICT, 0)};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(STRICT, &allocator);

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetDefaultCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return Device(STRICT, 0); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = make_generator<CPUGeneratorImpl>();
    return generator;
  }
};

// Memory -------------------------------------------------------------------------------------------------------------

ScalarType checked(std::optional<ScalarType> dtype) {
  ScalarType found = dtype.value_or(c10::get_default_dtype_as_scalartype());
  TORCH_CHECK_TYPE(has_float64 || (found != kDouble && found != kComplexDouble), "STRICT: this device has no float64");
  return found;
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1), checked(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  auto keys = DispatchKeySet(DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, checked(dtype));
}

// The same memory as a CPU tensor.
Tensor on_cpu(const Tensor& t) {
  char* start = static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.element_size();
  return from_blob(start, t.sizes(), t.strides(), TensorOptions().dtype(t.scalar_type()));
}

OptionalTensor on_cpu(const OptionalTensor& t) {
  return t && t->defined() ? OptionalTensor(on_cpu(*t)) : std::nullopt;
}

Tensor to_device(const Tensor& t) { return t.defined() ? t.to(Device(STRICT, 0)) : t; }

template <class... Tensors>
std::tuple<Tensors...> to_device(const std::tuple<Tensors...>& all) {
  return std::apply([](const auto&... t) { return std::make_tuple(to_device(t)...); }, all);
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool) {
  bool converts = self.scalar_type() != kDouble && dst.scalar_type() == kDouble;
  TORCH_CHECK_TYPE(has_float64 || !converts, "STRICT: this device has no float64: copy to the CPU first, then convert");
  Tensor to = dst.device().type() == STRICT ? on_cpu(dst) : dst;
  Tensor from = self.device().type() == STRICT ? on_cpu(self) : self;
  if (self.device().type() == STRICT && self.is_conj()) from = from.conj();
  if (self.device().type() == STRICT && self.is_neg()) from = from.neg();
  to.copy_(from);
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  if (dst.sizes() != self.sizes()) dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->numel() + impl->storage_offset()) * self.element_size();
  if (needed <= self.storage().nbytes()) return self;
  auto memory = allocator.allocate(needed);
  if (self.storage().nbytes()) memcpy(memory.get(), self.storage().data(), self.storage().nbytes());
  self.storage().set_data_ptr_noswap(std::move(memory));
  self.storage().unsafeGetStorageImpl()->set_nbytes(needed);
  return self;
}

Tensor& set_source(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride.empty() ? IntArrayRef(c10::contiguous_strides(size)) : stride);
  return self;
}

// Calls --------------------------------------------------------------------------------------------------------------

void see(const Tensor& t, bool written, bool& ours, bool& foreign) {
  if (!t.defined()) return;
  ours |= t.device().type() == STRICT;
  foreign |= t.device().is_cpu() && (t.dim() > 0 || written);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  bool ours = false, foreign = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    const auto* info = schema.arguments()[i].alias_info();
    bool written = info && info->isWrite();
    if (value.isTensor()) see(value.toTensor(), written, ours, foreign);
    else if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector()) see(t, written, ours, foreign);
    else if (value.isOptionalTensorList()) {
      // Indices: a CPU tensor is fine, one of the device in a CPU tensor is not.
      bool ignored = false;
      for (const auto& t : value.toOptionalTensorVector())
        if (t) see(*t, false, ours, ignored);
    }
  }
  TORCH_CHECK(!(ours && foreign), "STRICT: Expected all tensors to be on the same device, but found cpu and strict in ",
              schema.name());
  at::native::cpu_fallback(op, stack);
}

Tensor on_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().type() == STRICT, "STRICT: Expected all tensors to be on the same device in ", name);
  return on_cpu(t).contiguous();
}

Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output, int64_t groups) {
  return to_device(at::convolution(on_device(x, "convolution"), on_device(weight, "convolution"), on_cpu(bias), stride,
                                   padding, dilation, transposed, output, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output, int64_t groups, std::array<bool, 3> mask) {
  std::vector<int64_t> bias{weight.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
  return to_device(at::convolution_backward(
      on_device(grad, "convolution"), on_device(x, "convolution"), on_device(weight, "convolution"), IntArrayRef(bias),
      stride, padding, dilation, transposed, output, groups, mask));
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              int64_t n, int64_t c, int64_t size, int64_t groups, double epsilon) {
  return to_device(
      at::native_group_norm(on_device(x, "group_norm"), on_cpu(weight), on_cpu(bias), n, c, size, groups, epsilon));
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    int64_t n, int64_t c, int64_t size, int64_t groups, std::array<bool, 3> mask) {
  return to_device(at::native_group_norm_backward(on_device(grad, "group_norm"), on_device(x, "group_norm"),
                                                  on_cpu(mean), on_cpu(rstd), on_cpu(weight), n, c, size, groups, mask));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", [](const Tensor& t) { return at::_local_scalar_dense(on_cpu(t)); });
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_group_norm", group_norm);
  m.impl("native_group_norm_backward", group_norm_backward);
  m.impl("view", [](const Tensor& t, IntArrayRef size) { return at::native::view(t, size); });
  m.impl("as_strided", [](const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(t, size, stride, offset);
  });
  m.impl("_reshape_alias", [](const Tensor& t, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("view_as_complex", [](const Tensor& t) { return at::native::view_as_complex(t); });
  m.impl("view_as_real", [](const Tensor& t) { return at::native::view_as_real(t); });
  m.impl("unfold", [](const Tensor& t, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(t, dim, size, step);
  });
}

// Copies resolve the bits of lazy conjugation and negation by themselves.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT32)
}

}  // namespace

extern "C" void strict_register() {
  static Hooks hooks;
  RegisterPrivateUse1HooksInterface(&hooks);
}

extern "C" void strict_set_float64(bool value) { has_float64 = value; }
