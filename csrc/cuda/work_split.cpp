// The host's half of the work split: see work_split.h.
#include "work_split.h"

#include <algorithm>
#include <cstring>

#include "launch.h"

namespace pytracker::cuda {
namespace {

constexpr int64_t kAlignment = 8;  // vectors: a tensor starts on a 128-byte line, as allocators make it

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

std::vector<TensorEntry> line_up(const Layouts& layouts, int64_t* length) {
  std::vector<TensorEntry> tensors;
  tensors.reserve(layouts.tensors.size());
  int64_t at = 0;
  for (const Layout& layout : layouts.tensors) {
    TensorEntry entry = {};
    entry.begin = at;
    entry.per_vector = layout.strided < 0 ? static_cast<int32_t>(kVectorBytes / item_size(layout.dtype)) : 1;
    entry.vectors = divide_up(layout.numel, entry.per_vector);
    entry.numel = layout.numel;
    entry.repeat = layout.repeat;
    entry.implicit_zeros = layout.implicit_zeros;
    entry.strided = layout.strided;
    entry.dtype = layout.dtype;
    tensors.push_back(entry);
    *length = at + std::max<int64_t>(entry.vectors, 1);  // an empty one has a row to write, so it has a block
    at += round_up(entry.vectors, kAlignment) + kTensorCost;
  }
  return tensors;
}

// Tells each tensor its blocks and each block its tensors, and numbers the places where totals are gathered: one for
// each tensor that lies in several blocks and one for each block that has whole tensors. So the block that finishes the
// row reads as few as there are, in an order that depends on nothing.
std::vector<BlockEntry> deal(std::vector<TensorEntry>& tensors, Table& table) {
  std::vector<BlockEntry> blocks(table.n_blocks, BlockEntry{0, 0, -1, 0, {}});
  blocks[0].total = table.n_totals++;  // even with no tensors there is a row to finish
  for (int32_t t = 0; t < static_cast<int32_t>(tensors.size()); ++t) {
    TensorEntry& tensor = tensors[t];
    const int64_t last_vector = tensor.begin + std::max<int64_t>(tensor.vectors, 1) - 1;
    tensor.first_block = static_cast<int32_t>(tensor.begin / table.share);
    tensor.n_blocks = static_cast<int32_t>(last_vector / table.share) - tensor.first_block + 1;
    tensor.total = tensor.n_blocks > 1 ? table.n_totals++ : -1;
    for (int32_t b = tensor.first_block; b < tensor.first_block + tensor.n_blocks; ++b) {
      if (blocks[b].end_tensor == 0) blocks[b].first_tensor = t;
      blocks[b].end_tensor = t + 1;
    }
    BlockEntry& home = blocks[tensor.first_block];
    if (tensor.n_blocks == 1 && home.total < 0) home.total = table.n_totals++;
  }
  for (BlockEntry& block : blocks)
    std::copy(tensors.begin() + block.first_tensor,
              tensors.begin() + std::min(block.end_tensor, block.first_tensor + kWarps), block.first);
  return blocks;
}

std::vector<Launch> cut_into_launches(const std::vector<BlockEntry>& blocks, int32_t max_pointers) {
  std::vector<Launch> launches;
  for (int32_t b = 0; b < static_cast<int32_t>(blocks.size()); ++b) {
    const BlockEntry& block = blocks[b];
    if (launches.empty() || block.end_tensor - launches.back().first_tensor > max_pointers)
      launches.push_back({b, 0, block.first_tensor, 0});
    Launch& launch = launches.back();
    ++launch.n_blocks;
    launch.n_tensors = block.end_tensor - launch.first_tensor;
  }
  return launches;
}

template <typename T>
size_t append(std::vector<std::byte>& bytes, const std::vector<T>& values) {
  const size_t offset = round_up(bytes.size(), kVectorBytes);
  bytes.resize(offset + values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data() + offset, values.data(), values.size() * sizeof(T));
  return offset;
}

}  // namespace

Table build_table(const Layouts& layouts, int32_t max_pointers) {
  Table table;
  int64_t length = 0;
  std::vector<TensorEntry> tensors = line_up(layouts, &length);
  table.share = std::clamp(round_up(divide_up(length, kBlocksWanted), kShareUnit), kShareUnit, kMaxShare);
  table.n_blocks = static_cast<int32_t>(std::max<int64_t>(divide_up(length, table.share), 1));
  const std::vector<BlockEntry> blocks = deal(tensors, table);
  table.launches = cut_into_launches(blocks, max_pointers);

  append(table.bytes, tensors);
  table.blocks_offset = append(table.bytes, blocks);
  table.strided_offset = append(table.bytes, layouts.strided);

  // A block has a share of at most two tensors that it does not hold whole: one row for each, and one of the further
  // columns behind the totals.
  table.totals_offset = sizeof(double) * kColumns * 2 * table.n_blocks;
  table.workspace_bytes =
      table.totals_offset + sizeof(double) * (kTotals * table.n_totals + kExtraColumns * 2 * table.n_blocks);
  table.tickets_bytes = sizeof(uint32_t) * (1 + table.n_blocks);
  return table;
}

}  // namespace pytracker::cuda
