// What operators written against torch's C interface share.
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

using i64 = std::int64_t;

namespace {

enum Kind { BFLOAT16, FLOAT32, INT8, KINDS };  // types that kernels are added for

void check(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("an operator of qcompile: ") + what);
}

template <class T>
T from(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
StableIValue to(T value) {
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof(value));
  return result;
}

// Whether a tensor's type is one that kernels are added for, and which.
bool kind_of(AtenTensorHandle tensor, Kind* kind) {
  static const std::int32_t types[KINDS] = {
      aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float32(), aoti_torch_dtype_int8()};
  std::int32_t type;
  check(aoti_torch_get_dtype(tensor, &type), "a tensor has no type");
  for (int i = 0; i < KINDS; ++i) {
    if (types[i] == type) return *kind = (Kind)i, true;
  }
  return false;
}

template <class T = void>
T* data(AtenTensorHandle tensor) {
  void* address;
  check(aoti_torch_get_data_ptr(tensor, &address), "a tensor has no data");
  return static_cast<T*>(address);
}

const i64* sizes(AtenTensorHandle tensor) {
  i64* found;
  check(aoti_torch_get_sizes(tensor, &found), "a tensor has no sizes");
  return found;
}

const i64* strides(AtenTensorHandle tensor) {
  i64* found;
  check(aoti_torch_get_strides(tensor, &found), "a tensor has no strides");
  return found;
}

AtenTensorHandle item(StableListHandle list, i64 place) {
  StableIValue found;
  check(torch_list_get_item(list, (size_t)place, &found), "a list lacks a tensor");
  return from<AtenTensorHandle>(found);
}

// Null where there is none.
AtenTensorHandle given(StableIValue optional) {
  return optional == 0 ? nullptr : from<AtenTensorHandle>(*from<StableIValue*>(optional));
}

std::string_view text(StableIValue string) {
  size_t length;
  const char* characters;
  check(torch_string_length(from<StringHandle>(string), &length), "a string has no length");
  check(torch_string_c_str(from<StringHandle>(string), &characters), "a string has no text");
  return {characters, length};
}

int threads_for(i64 most) {
  std::uint32_t count = 1;
  check(torch_get_num_threads(&count), "torch has no threads");
  return (int)(most < 1 ? 1 : (i64)count < most ? (i64)count : most);
}

// Of float32 or bfloat16.
AtenTensorHandle empty(const i64* sizes, const i64* strides, int dimensions, Kind kind) {
  const std::int32_t type = kind == BFLOAT16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  AtenTensorHandle found;
  check(
      aoti_torch_empty_strided(dimensions, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &found),
      "there is no memory");
  return found;
}

// Arguments are an operator's to delete.
void drop(AtenTensorHandle tensor) { aoti_torch_delete_tensor_object(tensor); }

void drop_optional(StableIValue optional) {
  if (optional == 0) return;
  drop(given(optional));
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  torch_delete_stable_ivalue(from<StableIValue*>(optional));
#else
  delete from<StableIValue*>(optional);
#endif
}

void drop_list(StableListHandle list) {
  size_t count = 0;
  check(torch_list_size(list, &count), "a list has no size");
  for (size_t i = 0; i < count; ++i) drop(item(list, (i64)i));
  torch_delete_list(list);
}

// Leaves a call to another operator of the same arguments and results.
void pass_on(const char* name, StableIValue* stack) {
  if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) return;
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  throw std::runtime_error(torch_exception_get_what_without_backtrace());
#else
  throw std::runtime_error(std::string(name) + " failed; its error is above");
#endif
}

// What was added for specs.
template <class T>
class Added {
 public:
  const T* find(std::string_view spec, Kind kind) {
    std::shared_lock lock(mutex_);
    auto found = found_[kind].find(spec);
    return found == found_[kind].end() ? nullptr : found->second.get();
  }

  void add(const char* spec, int kind, const T& value) {
    std::unique_lock lock(mutex_);
    const std::string& kept = specs_.emplace_back(spec);
    found_[kind].try_emplace(kept, std::make_unique<const T>(value));
  }

  void forget() {
    std::unique_lock lock(mutex_);
    for (auto& of_kind : found_) of_kind.clear();
    specs_.clear();
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<std::string_view, std::unique_ptr<const T>> found_[KINDS];
  std::deque<std::string> specs_;  // which the maps' keys are views of
};

// Memory of the thread, which stays, since most calls need as much as the one before.
char* scratch(i64 bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local i64 size = 0;
  if (size < bytes) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, (size_t)size)));
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

i64 aligned(i64 bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace
