// The operator qcompile::gemm_cpu without Python: it finds the kernel of a spec and calls it, and leaves to
// qcompile::gemm_any, which is written in Python, what no kernel was added for.
//
// It speaks to torch through the C interface that stays from version to version (torch/csrc/stable), so building it
// takes none of torch's C++ headers.
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

// The struct that gemm.cpp takes.
struct Weight {
  void* tensors[6];
  i64 n, k, columns, super_columns;
};

// Of gemm.cpp: x and y are as the kernel has them; scratch is of m (stride + groups) floats.
using Gemm = void (*)(const void* x, i64 m, i64 stride, const Weight*, void* scratch, float* y, int threads);
// Of gemm_int8.cpp: x, or its codes and where they have one a group, their scales; y is of the kernel's type.
using IntegerGemm = void (*)(
    const void* x, const void* codes, const float* scale, i64 m, i64 stride, const Weight*, void* scratch, void* y,
    int threads);
using ScratchBytes = i64 (*)(const Weight*, i64 m, int threads);

// A linear whose x has one type: its kernel, and for how many rows of x that is the one to take.
struct Linear {
  void* gemm;                  // a Gemm, or an IntegerGemm
  ScratchBytes scratch_bytes;  // of an IntegerGemm, else null
  i64 rows;
  i64 single;     // whether the kernel takes float32 whatever x is
  i64 threads;    // at most
  i64 places[6];  // of a weight's tensors in the operator's list; -1 for those it lacks
  Weight weight;  // without tensors
};

namespace {

enum Kind { BFLOAT16, FLOAT32, INT8, KINDS };  // of x

struct Linears {
  std::shared_mutex mutex;
  std::unordered_map<std::string_view, std::unique_ptr<const Linear>> found[KINDS];
  std::deque<std::string> specs;  // which the maps' keys are views of
};

Linears& linears() {
  static Linears all;
  return all;
}

const Linear* find(std::string_view spec, Kind kind) {
  std::shared_lock lock(linears().mutex);
  auto found = linears().found[kind].find(spec);
  return found == linears().found[kind].end() ? nullptr : found->second.get();
}

void check(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("qcompile::gemm_cpu: ") + what);
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

void release(StableIValue tensor) {
  aoti_torch_delete_tensor_object(from<AtenTensorHandle>(tensor));
}

float widened(std::uint16_t value) {
  std::uint32_t bits = (std::uint32_t)value << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// To the nearest, ties to even.
std::uint16_t rounded(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  std::uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (std::uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

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

void multiply_floating(
    const Linear& linear, const Weight& weight, const void* x, i64 m, i64 k, bool half, void* y, int threads) {
  const i64 n = weight.n, groups = (k + weight.columns - 1) / weight.columns;
  const i64 own = aligned(4 * m * (k + groups)), wide = half && linear.single ? aligned(4 * m * k) : 0;
  char* memory = scratch(own + wide + (half ? 4 * m * n : 0));
  float* sums = half ? reinterpret_cast<float*>(memory + own + wide) : static_cast<float*>(y);
  if (wide) {
    float* values = reinterpret_cast<float*>(memory + own);
    for (i64 i = 0; i < m * k; ++i) values[i] = widened(static_cast<const std::uint16_t*>(x)[i]);
    x = values;
  }
  reinterpret_cast<Gemm>(linear.gemm)(x, m, k, &weight, memory, sums, threads);
  if (half) for (i64 i = 0; i < m * n; ++i) static_cast<std::uint16_t*>(y)[i] = rounded(sums[i]);
}

// y [m, N] of x [m, K]; null where no kernel is the one to take.
AtenTensorHandle multiply(AtenTensorHandle x, StableListHandle list, std::string_view spec) {
  std::int32_t type;
  check(aoti_torch_get_dtype(x, &type), "x has no type");
  const bool half = type == aoti_torch_dtype_bfloat16(), codes = type == aoti_torch_dtype_int8();
  if (!half && !codes && type != aoti_torch_dtype_float32()) return nullptr;
  const Linear* linear = find(spec, half ? BFLOAT16 : codes ? INT8 : FLOAT32);
  if (linear == nullptr) return nullptr;
  i64 *sizes, *strides;
  check(aoti_torch_get_sizes(x, &sizes), "x has no sizes");
  check(aoti_torch_get_strides(x, &strides), "x has no strides");
  const i64 m = sizes[0], k = sizes[1], n = linear->weight.n;
  const bool contiguous = strides[1] == 1 && (m == 1 || strides[0] == k);
  if (m == 0 || m > linear->rows || k % 32 || !contiguous) return nullptr;
  Weight weight = linear->weight;
  void* values;
  check(aoti_torch_get_data_ptr(x, &values), "x has no data");
  for (int i = 0; i < 6; ++i) {
    if (linear->places[i] < 0) continue;
    StableIValue item;
    check(torch_list_get_item(list, (size_t)linear->places[i], &item), "the weight lacks a tensor");
    check(aoti_torch_get_data_ptr(from<AtenTensorHandle>(item), &weight.tensors[i]), "the weight has no data");
  }
  std::uint32_t count = 1;
  check(torch_get_num_threads(&count), "no threads");
  const int threads = (int)((i64)count < linear->threads ? (i64)count : linear->threads);
  const i64 out_sizes[2] = {m, n}, out_strides[2] = {n, 1};
  const std::int32_t out_type = half ? type : aoti_torch_dtype_float32();
  AtenTensorHandle y;
  check(aoti_torch_empty_strided(2, out_sizes, out_strides, out_type, aoti_torch_device_type_cpu(), 0, &y), "no memory");
  void* out;
  check(aoti_torch_get_data_ptr(y, &out), "y has no data");
  if (linear->scratch_bytes != nullptr) {
    char* memory = scratch(linear->scratch_bytes(&weight, m, threads));
    reinterpret_cast<IntegerGemm>(linear->gemm)(
        codes ? nullptr : values, codes ? values : nullptr, nullptr, m, k, &weight, memory, out, threads);
  } else {
    multiply_floating(*linear, weight, values, m, k, half, out, threads);
  }
  return y;
}

// gemm_cpu(Tensor x, Tensor? x_scale, Tensor[] weight, str spec) -> Tensor; arguments are this function's to delete.
void gemm_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  StableListHandle weight = from<StableListHandle>(stack[2]);
  StringHandle spec = from<StringHandle>(stack[3]);
  size_t length;
  const char* text;
  check(torch_string_length(spec, &length), "no spec");
  check(torch_string_c_str(spec, &text), "no spec");
  AtenTensorHandle y = nullptr;
  if (stack[1] == 0) y = multiply(from<AtenTensorHandle>(stack[0]), weight, {text, length});
  if (y == nullptr) {
    check(torch_call_dispatcher("qcompile::gemm_any", "", stack, TORCH_ABI_VERSION), "see above");
    return;
  }
  size_t count = 0;
  torch_list_size(weight, &count);
  for (size_t i = 0; i < count; ++i) {
    StableIValue item;
    if (torch_list_get_item(weight, i, &item) == AOTI_TORCH_SUCCESS) release(item);
  }
  torch_delete_list(weight);
  torch_delete_string(spec);
  release(stack[0]);
  stack[0] = to(y);
}

}  // namespace

// Lets the operator know the kernel of a spec for x of bfloat16 (0), float32 (1) or int8 (2).
extern "C" void add_linear(const char* spec, int kind, const Linear* linear) {
  std::unique_lock lock(linears().mutex);
  const std::string& kept = linears().specs.emplace_back(spec);
  linears().found[kind].try_emplace(kept, std::make_unique<const Linear>(*linear));
}

// Registers the operator for CPUs: 0 if torch took it.
extern "C" int prepare() {
  static TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("qcompile", "CPU", __FILE__, __LINE__, &library)) return 1;
  return torch_library_impl(library, "gemm_cpu", gemm_cpu, TORCH_ABI_VERSION);
}
