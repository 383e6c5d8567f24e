// Where the rows of a stretch of positions lie, page by page.

// Where rows are, and their scales: those of neighbours in memory, `step` apart, and then all of them.
struct Run {
  const Scale* scale;
  i64 count, step;
};
struct Found {
  const Stored* rows[STRETCH + LANES];
  const Scale* vectors[STRETCH];  // the scales of each position, if they are COMPACT
  Run runs[STRETCH];
  float scales[STRETCH + LANES];
};

static inline void fetch_bytes(const void* from, i64 count) {
  for (i64 at = 0; at < count; at += 64) __builtin_prefetch((const char*)from + at);
}

// A stretch of keys or values.
struct Places {
  Strip of;
  Found* found;
  i64 count = 0, runs = 0;
  i64 before = 0;  // of them, those before what may be read

  Places(const Strip& strip, Found& place) : of(strip), found(&place) {}

  void find(i64 first, i64 end) {
    typedef i64 several __attribute__((vector_size(4 * LANES)));
    constexpr i64 SEVERAL = LANES / 2;
    several lane;
    for (int i = 0; i < SEVERAL; ++i) lane[i] = i;
    count = first < end ? least(STRETCH, end - first) : 0;
    runs = 0;
    before = of.first > first ? of.first - first : 0;
    for (i64 t = 0; t < count;) {
      const bool early = t < before;  // what is there may be anything; the weight is 0
      const i64 at = early ? of.first : first + t, page = of.pages[at / of.page], inside = at % of.page;
      const i64 there = least(count - t, early ? before - t : of.page - inside);
      const i64 step = early ? 0 : of.position;
      several row = (i64)(of.codes + page * of.batch + inside * of.position) + lane * step * (i64)sizeof(Stored);
      for (i64 i = 0; i < there; i += SEVERAL, row += SEVERAL * step * (i64)sizeof(Stored)) {
        put(found->rows + t + i, row);
      }
      if (!PLAIN && !of.shared()) {
        const Scale* scale = of.scale + page * of.scale_batch + inside * of.scale_position;
        const i64 scale_step = early ? 0 : of.scale_position;
        if constexpr (COMPACT) {
          for (i64 i = 0; i < there; ++i) found->vectors[t + i] = scale + i * scale_step;
        } else {
          found->runs[runs++] = {scale, there, scale_step};
        }
        if (of.page != ALL) fetch_bytes(scale, there * scale_step * sizeof(Scale));
      }
      t += there;
    }
    for (i64 t = 0; t < AHEAD; ++t) fetch(t);
  }
  // Before `scale` is asked: while the stretch before was worked on, what is read here was fetched.
  void read_scales() const {
    if constexpr (COMPACT) return;
    float* to = found->scales;
    for (i64 r = 0; r < runs; ++r) {
      const Run& run = found->runs[r];
      if (run.step == 1) std::memcpy(to, run.scale, run.count * sizeof(float));
      else for (i64 i = 0; i < run.count; ++i) to[i] = number(run.scale[i * run.step]);
      to += run.count;
    }
    put(to, f32{});  // of the rest of a vector
  }
  // A row that is read soon: processors know what follows in memory, but not the next page.
  void fetch(i64 t) const {
    if (of.page == ALL || t >= count) return;
    fetch_bytes(row(t), of.size / HALVES * sizeof(Stored));
  }

  const Stored* row(i64 t) const { return found->rows[t]; }
  f32 scale(i64 t) const {
    if constexpr (PLAIN || COMPACT) return everywhere(1.0f);
    return of.shared() ? everywhere(number(*of.scale)) : load<f32>(found->scales + t);
  }
};
