// A device named npu that computes with the processor: torch's slot for other vendors (PrivateUse1), filled in.
//
// It has its own memory, guard, generators and pinned memory, and every operator that the CPU has a kernel for, except
// those in MISSING. It is stricter than the CPU: an operator that gets tensors of two devices is refused, as a real
// device refuses it. A missing operator is computed on the host with a warning in the words of Ascend's plugin, and
// noted. What it does not have: an own queue (every call is done when it returns), own numbers, own speed.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_set>

using namespace at;

namespace {

constexpr auto NPU = c10::DeviceType::PrivateUse1;
const DispatchKeySet KEYS(DispatchKey::PrivateUse1);

// Names that begin so have no kernel here. The first is CTC's, forward and backward, as on some NPUs; the second is the
// fused kernel of weight norm; the others are listed in the environment, for tests of the probe.
std::vector<std::string> missing_names() {
  std::vector<std::string> names{"aten::_ctc_loss", "aten::_weight_norm_interface"};
  const char* more = std::getenv("NPU_STANDIN_MISSING");
  std::stringstream stream(more ? more : "");
  for (std::string name; std::getline(stream, name, ',');) names.push_back(name);
  return names;
}

bool is_missing(const std::string& name) {
  static const auto names = missing_names();
  return std::any_of(names.begin(), names.end(), [&](const auto& start) { return name.rfind(start, 0) == 0; });
}

// ------------------------------------------------------------------------------------------- devices and memory

thread_local DeviceIndex current_device = 0;

DeviceIndex count_devices() {
  const char* count = std::getenv("NPU_STANDIN_DEVICES");
  return static_cast<DeviceIndex>(count ? std::atoi(count) : 1);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return NPU; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(NPU, current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < count_devices(), "npu:", int(device.index()), " does not exist");
    current_device = std::max<DeviceIndex>(device.index(), 0);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = std::max<DeviceIndex>(device.index(), 0); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return count_devices(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &release, Device(NPU, current_device)};
  }
  static void release(void* data) {
    if (data) c10::free_cpu(data);
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(NPU, &memory);

// Page-locked memory of the host: ordinary memory, and a list of it.
std::mutex pinned_lock;
std::unordered_set<const void*> pinned;

struct PinnedMemory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned.insert(data);
    return {data, data, &release, Device(kCPU)};
  }
  static void release(void* data) {
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned.erase(data);
    if (data) c10::free_cpu(data);
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

// A generator of this device: an operator refuses one of another device.
struct NpuGenerator final : CPUGeneratorImpl {
  explicit NpuGenerator(DeviceIndex index) {
    device_ = Device(NPU, std::max<DeviceIndex>(index, 0));
    key_set_ = KEYS;
  }
  NpuGenerator* clone_impl() const override {
    auto copy = new NpuGenerator(device_.index());
    copy->set_state(*get_state());
    return copy;
  }
};

struct Hooks final : PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count_devices() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count_devices(); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = index; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = make_generator<NpuGenerator>(DeviceIndex(0));
    return generator;
  }
  Generator getNewGenerator(DeviceIndex index) const override { return make_generator<NpuGenerator>(index); }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> hold(pinned_lock);
    return pinned.count(data) > 0;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
Hooks hooks;
const bool hooks_registered = (RegisterPrivateUse1HooksInterface(&hooks), true);

// ------------------------------------------------------------------- operators that hand out memory, or look at it

c10::OptionalDeviceGuard guard_of(std::optional<Device> device) { return c10::OptionalDeviceGuard(device); }

Tensor empty(IntArrayRef sizes, std::optional<ScalarType> type, std::optional<Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  auto guard = guard_of(device);
  return at::detail::empty_generic(sizes, &memory, KEYS, type.value_or(get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> type, std::optional<Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  auto guard = guard_of(device);
  auto kind = type.value_or(get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, kind);
}

Tensor host_view(const Tensor& tensor) {  // a CPU tensor over the same bytes
  if (tensor.device().type() != NPU) return tensor;
  auto options = tensor.options().device(kCPU).requires_grad(false);
  return from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = tensor](void*) {}, options);
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  host_view(target).copy_(host_view(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef wanted, std::optional<MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(wanted);
  if (tensor.sizes() == sizes) return tensor;  // a view, written in place, keeps its strides
  auto* impl = tensor.unsafeGetTensorImpl();
  size_t bytes = (c10::multiply_integers(sizes) + impl->storage_offset()) * tensor.dtype().itemsize();
  if (bytes > tensor.storage().nbytes()) hooks.resizePrivateUse1Bytes(tensor.storage(), bytes);
  impl->set_sizes_contiguous(sizes);
  return tensor;
}

Scalar local_scalar_dense(const Tensor& tensor) { return host_view(tensor).item(); }

Tensor view(const Tensor& tensor, SymIntArrayRef sizes) { return native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes)); }

Tensor as_strided(const Tensor& tensor, SymIntArrayRef sizes, SymIntArrayRef strides, std::optional<SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef sizes, SymIntArrayRef strides) {
  return native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor& set_storage(Tensor& tensor, Storage source, SymInt offset, SymIntArrayRef sizes, SymIntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(sizes, strides, offset);
  return tensor;
}

bool is_pinned(const Tensor& tensor, std::optional<Device>) { return hooks.isPinnedPtr(tensor.storage().data()); }

// ------------------------------------------------------------------------------- all other operators, by the CPU's

void check_tensor(const Tensor& tensor, const c10::OperatorHandle& op) {
  // A number of the host (no dimension) may stand beside tensors of the device, as on every device of torch.
  // CTC's lengths are read on the host everywhere.
  const bool lengths = op.schema().name().rfind("aten::_ctc_loss", 0) == 0 && tensor.defined() && tensor.scalar_type() == kLong;
  TORCH_CHECK(!tensor.defined() || tensor.device().type() == NPU || tensor.dim() == 0 || lengths,
              "Expected all tensors to be on the same device, but found npu:0 and ", tensor.device(), " in ",
              op.schema().operator_name());
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<std::pair<Generator, Generator>> generators;  // this device's, and the one that draws for it
  for (auto at = stack->end() - op.schema().arguments().size(); at != stack->end(); ++at) {
    c10::IValue& value = *at;
    if (value.isTensor()) check_tensor(value.toTensor(), op);
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) check_tensor(tensor, op);
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        if (tensor) check_tensor(*tensor, op);
    if (value.isGenerator()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().type() == NPU, "Expected a 'npu' device type for generator but found '",
                  given.device().type(), "' in ", op.schema().operator_name());
      auto drawing = make_generator<CPUGeneratorImpl>();
      drawing.set_state(given.get_state());
      generators.emplace_back(given, drawing);
      value = drawing;
    }
  }
  native::cpu_fallback(op, stack);
  for (auto& [given, drawing] : generators) given.set_state(drawing.get_state());
}

std::mutex noted_lock;
std::set<std::string> noted, warned;

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name();
  {
    std::lock_guard<std::mutex> hold(noted_lock);
    noted.insert(name);
    if (warned.insert(name).second)
      TORCH_WARN("CAUTION: The operator '", name,
                 "' is not currently supported on the NPU backend and will fall back to run on the CPU.");
  }
  compute(op, stack);
}

std::vector<std::string> take_fallbacks() {  // the names since the last call
  std::lock_guard<std::mutex> hold(noted_lock);
  std::vector<std::string> names(noted.begin(), noted.end());
  noted.clear();
  return names;
}

Tensor to_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(Device(NPU, current_device)) : tensor; }

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   SymInt groups) {
  std::optional<Tensor> host_bias;
  if (bias && bias->defined()) host_bias = host_view(*bias);
  return to_device(at::convolution(host_view(x), host_view(weight), host_bias, C10_AS_INTARRAYREF_SLOW(stride),
                                   C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), transposed,
                                   C10_AS_INTARRAYREF_SLOW(output_padding), groups.expect_int()));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
    SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups, std::array<bool, 3> mask) {
  const std::vector<int64_t> bias_size{weight.size(transposed ? 1 : 0) * (transposed ? groups.expect_int() : 1)};
  auto [dx, dweight, dbias] = at::convolution_backward(
      host_view(grad), host_view(x), host_view(weight), bias_size, C10_AS_INTARRAYREF_SLOW(stride),
      C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), transposed,
      C10_AS_INTARRAYREF_SLOW(output_padding), groups.expect_int(), mask);
  return {to_device(dx), to_device(dweight), to_device(dbias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("resize_", resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("is_pinned", is_pinned);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  // Every other operator of which the CPU has a kernel.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(DispatchKey::CPU)) {
    auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || is_missing(name.name) || !op) continue;
    if (op->hasKernelForDispatchKey(DispatchKey::PrivateUse1) || !op->hasKernelForDispatchKey(DispatchKey::CPU)) continue;
    std::string full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
}

TORCH_LIBRARY(npu_standin, library) { library.def("take_fallbacks", take_fallbacks); }

}  // namespace
