// A rank's slice of the vocabulary.
#pragma once

#include <cstdint>

namespace npd {

// Owns the global ids [first, first + valid); an id outside never becomes a local column.
struct Shard {
  int64_t first, valid;

  bool owns(int64_t id) const { return id >= first && id - first < valid; }
};

}  // namespace npd
