// What attention.cpp is called with, and the blocks of queries and parts of the context that it takes at a time.

// Keys or values of one head of one sequence. A cache without pages is one that has a page for each sequence.
struct Strip {
  const Stored* codes;
  const Scale* scale;
  i64 batch, position, scale_batch, scale_position, size;
  const std::int32_t* pages;
  i64 page;
  i64 first;  // position from which on rows may be read

  bool shared() const { return scale_batch == 0 && scale_position == 0; }
};

// Keys or values of all: strides are in elements, those of scales 0 where a scale is shared; `batch` is that of pages.
struct Half {
  const Stored* codes;
  const Scale* scale;
  i64 batch, head, position;
  i64 scale_batch, scale_head, scale_position;
  i64 size;
};

// Integers of each sequence, or of all if the stride is 0, or none.
struct Each {
  const i64* data;
  i64 stride;

  i64 of(i64 b, i64 otherwise) const { return data == nullptr ? otherwise : data[b * stride]; }
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
  const std::int32_t* pages;  // [batch, most pages], or null
  i64 pages_batch, page;      // its stride, and the positions of a page
  i64 batch, heads, group, queries;
  i64 context;  // positions that a sequence may have
  Each length;  // positions from it on are not attended to
  Each start;   // nor those before it
  i64 causal;   // whether queries are at the last of these positions, and attend to none after their own
  i64 window;   // of the last positions before and with its own that a query attends to; 0 if to all
  double scale, softcap;

  i64 end(i64 b) const {
    const i64 told = length.of(b, context);
    return told < 0 ? 0 : least(told, context);
  }
  // The first position that any query of a sequence attends to.
  i64 first(i64 b) const {
    const i64 told = start.of(b, 0), seen = window ? end(b) - queries + 1 - window : 0;
    const i64 both = told > seen ? told : seen;
    return both < 0 ? 0 : least(both, end(b));
  }
  // Where parts begin: of pages of a multiple of 32 positions at one that is in the page of the first.
  i64 begin(i64 b) const { return first(b) == end(b) ? end(b) : first(b) / 32 * 32; }
  Strip strip(const Half& half, i64 b, i64 h) const {
    static const std::int32_t FIRST = 0;
    const i64 own = pages == nullptr ? b : 0;
    return {half.codes + own * half.batch + h * half.head,
            half.scale + own * half.scale_batch + h * half.scale_head,
            half.batch, half.position, half.scale_batch, half.scale_position, half.size,
            pages == nullptr ? &FIRST : pages + b * pages_batch,
            pages == nullptr ? ALL : page,
            first(b)};
  }

  i64 block() const { return group * queries <= MOST_ROWS ? queries : group < MOST_ROWS ? MOST_ROWS / group : 1; }
  i64 blocks() const { return quotient(queries, block()); }
  i64 tasks() const { return batch * heads * blocks(); }
};

// How the work is cut.
struct Plan {
  i64 part = STRETCH, parts = 1;  // positions of a part, and parts of the longest sequence
  i64 numbers = 0;                // of keys and values, that all blocks read

  explicit Plan(const Attention& a) {
    i64 steps = 0, most = 0;
    for (i64 b = 0; b < a.batch; ++b) {
      const i64 positions = a.end(b) - a.begin(b), own = quotient(positions, STRETCH);
      if (positions <= 0) continue;
      numbers += positions * a.tasks() / a.batch * (a.key.size + a.value.size);
      steps += own;
      most = own > most ? own : most;
    }
    const i64 longest = quotient(steps * (a.tasks() / a.batch), PARTS);
    if (longest > 1) part = longest * STRETCH;
    if (most > 0) parts = quotient(most * STRETCH, part);
  }
};

// Queries of a block, for all query heads of a head of keys: row r is query `first + r % queries` of head r / queries.
struct Block {
  i64 b, h, first, queries, group;
  i64 begin, end;  // positions that any of them attends to, and none behind `end`
  i64 start;       // the first that any of them attends to

  Block(const Attention& a, i64 task)
      : b(task / a.blocks() / a.heads), h(task / a.blocks() % a.heads), first(task % a.blocks() * a.block()),
        queries(least(a.block(), a.queries - first)), group(a.group), begin(a.begin(b)),
        end(a.causal ? a.end(b) - a.queries + first + queries : a.end(b)), start(a.first(b)) {}

  i64 rows() const { return group * queries; }
  template <class T>
  T* row(const Rows<T>& all, i64 r) const {
    return all.data + b * all.batch + (h * group + r / queries) * all.head + (first + r % queries) * all.query;
  }
  // As many as there is memory for.
  i64 held() const { return SQUARES && rows() > 16 ? quotient(rows(), 16) * 16 : rows(); }
  i64 lines() const { return quotient(rows(), LANES) * LANES; }
};
