// What attention.cpp is called with, and the blocks of queries and parts of the context that it takes at a time.

// Keys or values of one head of one sequence.
struct Strip {
  const Stored* rows;
  const float* scale;
  i64 stride, scale_stride, size;

  const Stored* row(i64 position) const { return rows + position * stride; }
};

// Keys or values of all: strides are in elements, those of scales 0 where a scale is shared.
struct Half {
  const Stored* codes;
  const float* scale;
  i64 batch, head, position;
  i64 scale_batch, scale_head, scale_position;
  i64 size;

  Strip strip(i64 b, i64 h) const {
    return {codes + b * batch + h * head, scale + b * scale_batch + h * scale_head, position, scale_position, size};
  }
};

enum Mask : i64 { NONE, BOOLEAN, FLOAT32, BFLOAT16, FLOAT16 };

// Where rows of queries, or of results, lie: strides of [batch, heads * group, queries, size] in elements.
template <class T>
struct Rows {
  T* data;
  i64 batch, head, query;
};

struct Attention {
  Rows<const Query> query;
  Rows<Query> y;
  Half key, value;
  const void* mask;
  i64 mask_kind, mask_batch, mask_head, mask_query;  // strides in elements; that of positions is 1
  i64 batch, heads, group, queries;
  i64 length;  // positions that are attended to
  i64 causal;  // whether queries are at the last of these positions, and attend to none after their own
  i64 window;  // of the last positions before and with its own that a query attends to; 0 if to all
  double scale, softcap;

  i64 block() const { return group * queries <= MOST_ROWS ? queries : group < MOST_ROWS ? MOST_ROWS / group : 1; }
  i64 blocks() const { return quotient(queries, block()); }
  i64 tasks() const { return batch * heads * blocks(); }
  // Of keys and values, that all blocks read.
  i64 numbers() const { return tasks() * length * (key.size + value.size); }
  i64 part() const {
    i64 steps = quotient(length, STRETCH), parts = least(steps, quotient(PARTS, tasks()));
    return parts > 1 ? quotient(steps, parts) * STRETCH : length > 0 ? length : 1;
  }
  i64 parts() const { return length > 0 ? quotient(length, part()) : 1; }
};

// Queries of a block, for all query heads of a head of keys: row r is query `first + r % queries` of head r / queries.
struct Block {
  i64 b, h, first, queries, group;
  i64 length;  // positions that the last query attends to

  Block(const Attention& a, i64 task)
      : b(task / a.blocks() / a.heads), h(task / a.blocks() % a.heads), first(task % a.blocks() * a.block()),
        queries(least(a.block(), a.queries - first)), group(a.group),
        length(a.causal ? a.length - a.queries + first + queries : a.length) {}

  i64 rows() const { return group * queries; }
  template <class T>
  T* row(const Rows<T>& all, i64 r) const {
    return all.data + b * all.batch + (h * group + r / queries) * all.head + (first + r % queries) * all.query;
  }
  // As many as there is memory for.
  i64 held() const { return SQUARES && rows() > 16 ? quotient(rows(), 16) * 16 : rows(); }
  i64 lines() const { return quotient(rows(), LANES) * LANES; }
};
