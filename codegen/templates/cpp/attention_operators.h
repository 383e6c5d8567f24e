// Attention to a cache.

// The structs that attention.cpp takes.
struct Half {
  const void* codes;
  const void* scale;
  i64 batch, head, position, scale_batch, scale_head, scale_position, size;
};

struct Rows {
  void* data;
  i64 batch, head, query;
};

struct Each {
  const void* data;
  i64 stride;
};

struct Attention {
  Rows query, y;
  Half key, value;
  const void* mask;
  i64 mask_kind, mask_batch, mask_head, mask_query;
  const void* pages;
  i64 pages_batch, page;
  i64 batch, heads, group, queries, context;
  Each length, start;
  i64 causal, window;
  double scale, softcap;
};

// Attention with a cache of one kind, from queries of one type.
struct Attend {
  void (*attention)(const Attention*, int threads);
  i64 rows;                // queries times query heads a head of keys, at most
  i64 key_size, value_size;
  double scale, softcap;
  i64 causal, window;
};

namespace {

Added<Attend>& attends() {
  static Added<Attend> all;
  return all;
}

Half half_of(AtenTensorHandle codes, AtenTensorHandle scale, i64 size) {
  const i64* by = strides(codes);
  Half half = {data(codes), nullptr, by[0], by[1], by[2], 0, 0, 0, size};
  if (scale == nullptr) return half;
  i64 dimensions;
  check(aoti_torch_get_dim(scale, &dimensions), "a scale has no dimensions");
  half.scale = data(scale);
  by = strides(scale);
  if (dimensions == 1) half.scale_head = by[0];
  if (dimensions > 2) half.scale_batch = by[0], half.scale_head = by[1], half.scale_position = by[2];
  return half;
}

// Whether neighbours in a vector, or scales of one, lie side by side.
bool lies(AtenTensorHandle tensor) {
  i64 dimensions = 0;
  if (tensor != nullptr) check(aoti_torch_get_dim(tensor, &dimensions), "a tensor has no dimensions");
  return dimensions < 4 || strides(tensor)[3] == 1;
}

struct Cache {
  AtenTensorHandle key, key_scale, value, value_scale;
};

// Which positions are attended to, and in which pages they are.
struct Places {
  AtenTensorHandle length, start, table;
};

// Whether integers, one for all or one for each sequence, are as kernels take them.
bool each_of(AtenTensorHandle tensor, i64 batch, Each* each) {
  *each = {nullptr, 0};
  if (tensor == nullptr) return true;
  std::int32_t type;
  i64 dimensions;
  check(aoti_torch_get_dtype(tensor, &type), "a length has no type");
  check(aoti_torch_get_dim(tensor, &dimensions), "a length has no dimensions");
  if (type != aoti_torch_dtype_int64() || dimensions > 1) return false;
  const i64 count = dimensions == 0 ? 1 : sizes(tensor)[0];
  *each = {data(tensor), count == 1 ? 0 : strides(tensor)[0]};
  return count == 1 || count == batch;
}

// y [B, Hq, Q, Dv] of queries [B, Hq, Q, D]; null where no kernel is the one to take.
AtenTensorHandle attend(
    const Attend& kernel, AtenTensorHandle query, Kind kind, const Cache& cache, const Places& places, i64 key_size,
    i64 value_size, double scale, bool causal, i64 window) {
  const i64 *shape = sizes(query), *by = strides(query), *stored = sizes(cache.key);
  const i64 batch = shape[0], heads = stored[1], group = shape[1] / heads, queries = shape[2];
  for (int i = 0; i < 4; ++i) {
    if (shape[i] == 0) return nullptr;
  }
  const bool rows_lie = by[3] == 1 && lies(cache.key) && lies(cache.value) && lies(cache.key_scale) &&
                        lies(cache.value_scale);
  if (group * queries > kernel.rows || !rows_lie || value_size == 0) return nullptr;
  Each length, start;
  if (!each_of(places.length, batch, &length) || !each_of(places.start, batch, &start)) return nullptr;
  const void* pages = nullptr;
  i64 pages_batch = 0, context = stored[2];
  if (places.table != nullptr) {
    std::int32_t type;
    check(aoti_torch_get_dtype(places.table, &type), "a block table has no type");
    if (type != aoti_torch_dtype_int32() || strides(places.table)[1] != 1) return nullptr;
    pages = data(places.table);
    pages_batch = strides(places.table)[0];
    context *= sizes(places.table)[1];
  }
  // All heads of a token lie together, as the projection after it reads them.
  const i64 out_shape[4] = {shape[0], shape[1], queries, value_size};
  const i64 out_by[4] = {queries * shape[1] * value_size, value_size, shape[1] * value_size, 1};
  AtenTensorHandle y = empty(out_shape, out_by, 4, kind);
  const Attention call = {
      {data(query), by[0], by[1], by[2]}, {data(y), out_by[0], out_by[1], out_by[2]},
      half_of(cache.key, cache.key_scale, key_size), half_of(cache.value, cache.value_scale, value_size),
      nullptr, 0, 0, 0, 0, pages, pages_batch, stored[2], batch, heads, group, queries, context, length, start,
      causal, window, scale, kernel.softcap};
  kernel.attention(&call, threads_for(batch * heads * queries));
  return y;
}

// attention_plain_cpu(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? length, float scale, bool causal,
//                     int window) -> Tensor
void attention_plain_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  AtenTensorHandle query = from<AtenTensorHandle>(stack[0]), y = nullptr;
  const Cache cache = {from<AtenTensorHandle>(stack[1]), nullptr, from<AtenTensorHandle>(stack[2]), nullptr};
  Kind kind;
  if (given(stack[3]) == nullptr && kind_of(query, &kind)) {
    if (const Attend* found = attends().find("", kind)) {
      const i64 key_size = sizes(cache.key)[3], value_size = sizes(cache.value)[3];
      y = attend(
          *found, query, kind, cache, {given(stack[4]), nullptr, nullptr}, key_size, value_size,
          from<double>(stack[5]), from<bool>(stack[6]), from<i64>(stack[7]));
    }
  }
  if (y == nullptr) return pass_on("qcompile::attention_plain_any", stack);
  for (AtenTensorHandle tensor : {query, cache.key, cache.value}) drop(tensor);
  drop_optional(stack[4]);
  stack[0] = to(y);
}

// attention_cpu(Tensor query, Tensor[] cache, Tensor? mask, Tensor? length, str spec, *, Tensor? start,
//               Tensor? block_table) -> Tensor
void attention_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  AtenTensorHandle query = from<AtenTensorHandle>(stack[0]), y = nullptr;
  StableListHandle list = from<StableListHandle>(stack[1]);
  Kind kind;
  if (given(stack[2]) == nullptr && kind_of(query, &kind)) {
    if (const Attend* found = attends().find(text(stack[4]), kind)) {
      const Cache cache = {item(list, 0), item(list, 1), item(list, 2), item(list, 3)};
      y = attend(
          *found, query, kind, cache, {given(stack[3]), given(stack[5]), given(stack[6])}, found->key_size,
          found->value_size, found->scale, found->causal, found->window);
    }
  }
  if (y == nullptr) return pass_on("qcompile::attention_any", stack);
  drop(query);
  drop_list(list);
  for (int place : {3, 5, 6}) drop_optional(stack[place]);
  torch_delete_string(from<StringHandle>(stack[4]));
  stack[0] = to(y);
}

}  // namespace

// Lets the operators know the kernel of a spec, or "" for caches that are not quantized, for queries of bfloat16 (0) or
// float32 (1).
extern "C" void add_attention(const char* spec, int kind, const Attend* attend) { attends().add(spec, kind, *attend); }
