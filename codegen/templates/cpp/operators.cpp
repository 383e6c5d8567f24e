// The operators of CPUs without Python: each finds the kernel of a spec and calls it, and leaves to an operator that is
// written in Python what no kernel was added for.
//
// They speak to torch through the C interface that stays from version to version (torch/csrc/stable), so building them
// takes none of torch's C++ headers.
#include "operators.h"

#include "attention_operators.h"

// The struct that gemm.cpp takes.
struct Weight {
  void* tensors[6];
  i64 n, k, columns, super_columns;
};

// Of gemm.cpp: x is as the kernel has it; scratch is of m (stride + groups) floats, and of those for 16 rows at least.
using Gemm = void (*)(const void* x, i64 m, i64 stride, const Weight*, void* scratch, void* y, int half, int threads);
// Of gemm_int8.cpp: x, or its codes and where they have one a group, their scales; y is of the kernel's type.
using IntegerGemm = void (*)(
    const void* x, const void* codes, const float* scale, i64 m, i64 stride, const Weight*, void* scratch, void* y,
    int threads);
using ScratchBytes = i64 (*)(const Weight*, i64 m, int threads);

// A kernel, and for how many rows of x at most that is the one to take.
struct Product {
  void* gemm;                  // a Gemm, or an IntegerGemm
  ScratchBytes scratch_bytes;  // of an IntegerGemm, else null
  i64 rows;
  i64 single;  // whether the kernel takes float32 whatever x is
};

// A linear whose x has one type.
struct Linear {
  Product products[2];  // from the fewest rows
  i64 threads;          // at most
  i64 places[6];  // of a weight's tensors in the operator's list; -1 for those it lacks
  Weight weight;  // without tensors
};

namespace {

Added<Linear>& linears() {
  static Added<Linear> all;
  return all;
}

float widened(std::uint16_t value) {
  std::uint32_t bits = (std::uint32_t)value << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

void multiply_floating(
    const Product& product, const Weight& weight, const void* x, i64 m, i64 k, bool half, void* y, int threads) {
  const i64 groups = (k + weight.columns - 1) / weight.columns;
  const i64 own = aligned(4 * (m < 16 ? 16 : m) * (k + groups)), wide = half && product.single ? aligned(4 * m * k) : 0;
  char* memory = scratch(own + wide);
  if (wide) {
    float* values = reinterpret_cast<float*>(memory + own);
    for (i64 i = 0; i < m * k; ++i) values[i] = widened(static_cast<const std::uint16_t*>(x)[i]);
    x = values;
  }
  reinterpret_cast<Gemm>(product.gemm)(x, m, k, &weight, memory, y, half, threads);
}

// y [m, N] of x [m, K]; null where no kernel is the one to take.
AtenTensorHandle multiply(AtenTensorHandle x, StableListHandle list, std::string_view spec) {
  Kind kind;
  if (!kind_of(x, &kind)) return nullptr;
  const Linear* linear = linears().find(spec, kind);
  if (linear == nullptr) return nullptr;
  const i64 m = sizes(x)[0], k = sizes(x)[1];
  const bool contiguous = strides(x)[1] == 1 && (m == 1 || strides(x)[0] == k);
  const Product& product = linear->products[m > linear->products[0].rows];
  if (m == 0 || m > product.rows || k % 32 || !contiguous) return nullptr;
  Weight weight = linear->weight;
  for (int i = 0; i < 6; ++i) {
    if (linear->places[i] >= 0) weight.tensors[i] = data(item(list, linear->places[i]));
  }
  const int threads = threads_for(linear->threads);
  const i64 shape[2] = {m, weight.n}, by[2] = {weight.n, 1};
  AtenTensorHandle y = empty(shape, by, 2, kind);
  if (product.scratch_bytes != nullptr) {
    const void *values = kind == INT8 ? nullptr : data(x), *codes = kind == INT8 ? data(x) : nullptr;
    char* memory = scratch(product.scratch_bytes(&weight, m, threads));
    reinterpret_cast<IntegerGemm>(product.gemm)(values, codes, nullptr, m, k, &weight, memory, data(y), threads);
  } else {
    multiply_floating(product, weight, data(x), m, k, kind == BFLOAT16, data(y), threads);
  }
  return y;
}

// gemm_cpu(Tensor x, Tensor? x_scale, Tensor[] weight, str spec) -> Tensor
void gemm_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  AtenTensorHandle x = from<AtenTensorHandle>(stack[0]), y = nullptr;
  StableListHandle weight = from<StableListHandle>(stack[2]);
  if (given(stack[1]) == nullptr) y = multiply(x, weight, text(stack[3]));
  if (y == nullptr) return pass_on("qcompile::gemm_any", stack);
  drop(x);
  drop_list(weight);
  torch_delete_string(from<StringHandle>(stack[3]));
  stack[0] = to(y);
}

}  // namespace

// Lets the operator know the kernel of a spec for x of bfloat16 (0), float32 (1) or int8 (2).
extern "C" void add_linear(const char* spec, int kind, const Linear* linear) { linears().add(spec, kind, *linear); }

// Forgets all kernels; no call may be under way.
extern "C" void forget_kernels() {
  linears().forget();
  attends().forget();
}

// Registers the operators for CPUs: 0 if torch took them.
extern "C" int prepare() {
  static TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("qcompile", "CPU", __FILE__, __LINE__, &library)) return 1;
  return torch_library_impl(library, "gemm_cpu", gemm_cpu, TORCH_ABI_VERSION) ||
         torch_library_impl(library, "attention_cpu", attention_cpu, TORCH_ABI_VERSION) ||
         torch_library_impl(library, "attention_plain_cpu", attention_plain_cpu, TORCH_ABI_VERSION);
}
