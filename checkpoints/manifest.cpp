#include "manifest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <set>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <xxhash.h>

#include "checkpoint.pb.h"

namespace normformer {

namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr std::string_view kHead = "NFCKPT01";
constexpr std::string_view kTail = "10TPKCFN";
constexpr uint32_t kFrameVersion = 1;
constexpr size_t kHeadBytes = 32;  // head, versions, payload length, checksum of these
constexpr size_t kTailBytes = 16;  // checksum of the payload, tail

constexpr int64_t kMaxFiles = 1'000'000;
constexpr int64_t kMaxTensors = 1'000'000;
constexpr int64_t kMaxItems = 4'000'000;  // messages and texts in all; each takes far more memory than bytes
constexpr size_t kMaxNameBytes = 512;

constexpr std::array<std::pair<DType, format::ElementType>, 7> kTypes{{{DType::f64, format::F64},
                                                                       {DType::f32, format::F32},
                                                                       {DType::bf16, format::BF16},
                                                                       {DType::f16, format::F16},
                                                                       {DType::i64, format::I64},
                                                                       {DType::i32, format::I32},
                                                                       {DType::u8, format::U8}}};
constexpr std::array<std::pair<Role, format::TensorRole>, 4> kRoles{{{Role::parameter, format::PARAMETER},
                                                                     {Role::master, format::MASTER},
                                                                     {Role::moment1, format::MOMENT1},
                                                                     {Role::moment2, format::MOMENT2}}};

template <class Table, class Theirs>
auto find_ours(const Table& table, Theirs theirs) {
  std::optional<typename Table::value_type::first_type> found;
  for (const auto& [ours, other] : table) {
    if (other == theirs) found = ours;
  }
  return found;
}

template <class Table, class Ours>
auto to_theirs(const Table& table, Ours ours) {
  for (const auto& [mine, theirs] : table) {
    if (mine == ours) return theirs;
  }
  NF_CHECK(false, "value {} is not in the format", static_cast<int>(ours));
}

/// What is wrong with bytes that were read; becomes DamagedCheckpoint with the file's name.
struct Fault {
  std::string reason;
};

template <class... Args>
void require(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) throw Fault{fmt::format(format, std::forward<Args>(args)...)};
}

int64_t to_count(uint64_t value, std::string_view what) {
  require(value <= static_cast<uint64_t>(INT64_MAX), "{} is {}", what, value);
  return static_cast<int64_t>(value);
}

int64_t product(int64_t a, int64_t b, std::string_view what) {
  int64_t result = 0;
  require(!__builtin_mul_overflow(a, b, &result), "{} leaves 64 bits", what);
  return result;
}

template <class T>
void append_number(std::string& bytes, T number) {
  std::array<char, sizeof(T)> raw;
  std::memcpy(raw.data(), &number, sizeof(T));
  bytes.append(raw.data(), raw.size());
}

template <class T>
T number_at(std::string_view bytes, size_t offset) {
  T number;
  std::memcpy(&number, bytes.data() + offset, sizeof(T));
  return number;
}

std::string serialise(const google::protobuf::Message& message) {
  std::string bytes;
  google::protobuf::io::StringOutputStream stream(&bytes);
  google::protobuf::io::CodedOutputStream out(&stream);
  out.SetSerializationDeterministic(true);
  NF_CHECK(message.SerializeToCodedStream(&out), "a message of {} could not be written",
           message.GetTypeName());
  out.Trim();
  return bytes;
}

// Writing.

void put_tensor(const StoredTensor& tensor, format::LogicalTensor& out) {
  out.set_name(tensor.info.name);
  out.set_role(to_theirs(kRoles, tensor.info.role));
  out.set_type(to_theirs(kTypes, tensor.info.dtype));
  out.set_rows(static_cast<uint64_t>(tensor.info.rows));
  out.set_columns(static_cast<uint64_t>(tensor.info.columns));
  for (const StoredPiece& piece : tensor.pieces) {
    format::Piece& p = *out.add_pieces();
    const Rectangle& rectangle = piece.place.rectangle;
    p.set_file(static_cast<uint32_t>(piece.file));
    p.set_offset(static_cast<uint64_t>(piece.offset));
    p.set_row_begin(static_cast<uint64_t>(rectangle.rows.begin));
    p.set_row_end(static_cast<uint64_t>(rectangle.rows.end));
    p.set_column_begin(static_cast<uint64_t>(rectangle.columns.begin));
    p.set_column_end(static_cast<uint64_t>(rectangle.columns.end));
    p.set_range_begin(static_cast<uint64_t>(piece.place.range.begin));
    p.set_range_end(static_cast<uint64_t>(piece.place.range.end));
    p.mutable_block_checksums()->Assign(piece.block_checksums.begin(), piece.block_checksums.end());
  }
}

void put_file(const DataFile& file, format::DataFile& out) {
  out.set_name(file.name);
  out.set_bytes(static_cast<uint64_t>(file.bytes));
}

void put_info(const CheckpointInfo& info, format::RunInfo& out) {
  out.set_run_id(info.run_id);
  out.set_update_count(static_cast<uint64_t>(info.update_count));
  out.set_batch_index(static_cast<uint64_t>(info.batch_index));
  out.set_skipped_in_a_row(static_cast<uint64_t>(info.skipped_in_a_row));
  out.set_tokens_seen(static_cast<uint64_t>(info.tokens_seen));
  out.set_consumed_samples(static_cast<uint64_t>(info.consumed_samples));
  out.set_seed(info.seed);
  out.set_config_toml(info.config_toml);
  out.set_tokenizer_hash(info.tokenizer_hash);
  for (const auto& [name, value] : info.metrics) (*out.mutable_metrics())[name] = value;
  out.set_loss_scale(info.loss_scale);
  out.set_clean_updates(static_cast<uint64_t>(info.clean_updates));
  out.set_overflows(static_cast<uint64_t>(info.overflows));
  out.mutable_recent_losses()->Assign(info.recent_losses.begin(), info.recent_losses.end());
  out.mutable_recent_gradient_norms()->Assign(info.recent_gradient_norms.begin(),
                                              info.recent_gradient_norms.end());
  out.mutable_trend_losses()->Assign(info.trend_losses.begin(), info.trend_losses.end());
  if (info.lowest_loss) out.set_lowest_loss(*info.lowest_loss);
  out.set_data_fingerprint(info.data_fingerprint);
  for (const auto& [name, value] : info.layout) (*out.mutable_layout())[name] = value;
}

// Reading: from messages to our types, checking what concerns one message alone.

StoredPiece take_piece(const format::Piece& p, const StoredTensorInfo& tensor) {
  const std::string what = fmt::format("a place in tensor '{}'", tensor.name);
  StoredPiece piece;
  piece.file = p.file();
  piece.offset = to_count(p.offset(), what);
  Rectangle& rectangle = piece.place.rectangle;
  rectangle.rows = {to_count(p.row_begin(), what), to_count(p.row_end(), what)};
  rectangle.columns = {to_count(p.column_begin(), what), to_count(p.column_end(), what)};
  rectangle.global_rows = tensor.rows;
  rectangle.global_columns = tensor.columns;
  piece.place.range = {to_count(p.range_begin(), what), to_count(p.range_end(), what)};
  require(!rectangle.rows.empty() && rectangle.rows.end <= tensor.rows && !rectangle.columns.empty() &&
              rectangle.columns.end <= tensor.columns,
          "a piece of tensor '{}' lies outside of it", tensor.name);
  require(!piece.place.range.empty() && piece.place.range.end <= rectangle.numel(),
          "a piece of tensor '{}' lies outside its rectangle", tensor.name);
  piece.block_checksums.assign(p.block_checksums().begin(), p.block_checksums().end());
  return piece;
}

StoredTensor take_tensor(const format::LogicalTensor& t) {
  StoredTensor tensor;
  StoredTensorInfo& info = tensor.info;
  info.name = t.name();
  const auto is_control = [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; };
  require(!info.name.empty() && info.name.size() <= kMaxNameBytes &&
              std::none_of(info.name.begin(), info.name.end(), is_control),
          "a tensor's name is empty, too long or has control characters");
  const auto role = find_ours(kRoles, t.role());
  const auto dtype = find_ours(kTypes, t.type());
  require(role && dtype, "tensor '{}' has an unknown role or type", info.name);
  info.role = *role;
  info.dtype = *dtype;
  info.rows = to_count(t.rows(), "a number of rows");
  info.columns = to_count(t.columns(), "a number of columns");
  require(info.rows > 0 && info.columns > 0, "tensor '{}' has no elements", info.name);
  product(product(info.rows, info.columns, "a tensor"), size_of(info.dtype), "a tensor");
  tensor.pieces.reserve(static_cast<size_t>(t.pieces_size()));
  for (const format::Piece& p : t.pieces()) tensor.pieces.push_back(take_piece(p, info));
  return tensor;
}

DataFile take_file(const format::DataFile& f) { return {f.name(), to_count(f.bytes(), "a file's length")}; }

std::vector<double> take_recent(const google::protobuf::RepeatedField<double>& values) {
  for (const double value : values) require(std::isfinite(value), "a recent loss or norm is not finite");
  return {values.begin(), values.end()};
}

CheckpointInfo take_info(const format::RunInfo& r) {
  CheckpointInfo info;
  info.run_id = r.run_id();
  info.update_count = to_count(r.update_count(), "the update count");
  info.batch_index = to_count(r.batch_index(), "the batch index");
  info.skipped_in_a_row = to_count(r.skipped_in_a_row(), "the number of skipped batches");
  info.tokens_seen = to_count(r.tokens_seen(), "the number of tokens");
  info.consumed_samples = to_count(r.consumed_samples(), "the number of samples");
  info.seed = r.seed();
  info.config_toml = r.config_toml();
  info.tokenizer_hash = r.tokenizer_hash();
  info.metrics.insert(r.metrics().begin(), r.metrics().end());
  info.layout.insert(r.layout().begin(), r.layout().end());
  info.loss_scale = r.loss_scale();
  int exponent = 0;
  require(info.loss_scale == 0.0 || std::frexp(info.loss_scale, &exponent) == 0.5,
          "the loss scale {} is not a power of two", info.loss_scale);
  info.clean_updates = to_count(r.clean_updates(), "the number of updates since the loss scale changed");
  info.overflows = to_count(r.overflows(), "the number of overflows");
  info.recent_losses = take_recent(r.recent_losses());
  info.recent_gradient_norms = take_recent(r.recent_gradient_norms());
  require(info.recent_losses.size() == info.recent_gradient_norms.size(),
          "it has {} recent losses for {} gradient norms", info.recent_losses.size(),
          info.recent_gradient_norms.size());
  info.trend_losses = take_recent(r.trend_losses());
  if (r.has_lowest_loss()) info.lowest_loss = r.lowest_loss();
  require(std::isfinite(info.lowest_loss.value_or(0.0)), "the lowest loss is not finite");
  info.data_fingerprint = r.data_fingerprint();
  return info;
}

// Reading: the whole.

bool is_plain_name(std::string_view name) {
  if (name.empty() || name.size() > 255 || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

void check_files(const std::vector<DataFile>& files) {
  std::set<std::string_view> names;
  for (size_t i = 0; i < files.size(); ++i) {
    require(is_plain_name(files[i].name) && files[i].name != kManifestName,
            "its data file {} has a forbidden name", i);
    require(names.insert(files[i].name).second, "the data file '{}' is listed twice", files[i].name);
  }
}

int64_t piece_bytes(const StoredTensor& tensor, const StoredPiece& piece) {
  return piece.place.range.size() * size_of(tensor.info.dtype);
}

/// The pieces of each file lie one after another and fill it.
void check_files_are_filled(const Manifest& manifest) {
  std::vector<std::vector<Range>> used(manifest.files.size());
  for (const StoredTensor& tensor : manifest.tensors) {
    for (const StoredPiece& piece : tensor.pieces) {
      require(piece.file < static_cast<int64_t>(used.size()), "tensor '{}' is in a file that is not listed",
              tensor.info.name);
      const int64_t bytes = piece_bytes(tensor, piece);
      const DataFile& file = manifest.files[static_cast<size_t>(piece.file)];
      require(bytes <= file.bytes && piece.offset <= file.bytes - bytes,
              "a piece of tensor '{}' lies outside the file '{}'", tensor.info.name, file.name);
      require(static_cast<int64_t>(piece.block_checksums.size()) == ceil_div(bytes, manifest.block_bytes),
              "a piece of tensor '{}' has {} checksums", tensor.info.name, piece.block_checksums.size());
      used[static_cast<size_t>(piece.file)].push_back({piece.offset, piece.offset + bytes});
    }
  }
  for (size_t i = 0; i < used.size(); ++i) {
    std::sort(used[i].begin(), used[i].end(), [](Range a, Range b) { return a.begin < b.begin; });
    int64_t end = 0;
    for (const Range bytes : used[i]) {
      require(bytes.begin == end, "the pieces in file '{}' leave a gap or overlap at byte {}",
              manifest.files[i].name, end);
      end = bytes.end;
    }
    require(end == manifest.files[i].bytes, "the pieces in file '{}' end at byte {} of {}",
            manifest.files[i].name, end, manifest.files[i].bytes);
  }
}

void check_tensors(const std::vector<StoredTensor>& tensors) {
  const StoredTensor* previous = nullptr;
  for (const StoredTensor& tensor : tensors) {
    const StoredTensorInfo& info = tensor.info;
    require(previous == nullptr ||
                std::pair(previous->info.name, previous->info.role) < std::pair(info.name, info.role),
            "tensor '{}' is listed twice or out of order", info.name);
    previous = &tensor;
    std::vector<PiecePlace> places;
    places.reserve(tensor.pieces.size());
    for (const StoredPiece& piece : tensor.pieces) places.push_back(piece.place);
    const std::string fault = find_cover_fault(info.rows, info.columns, places);
    require(fault.empty(), "tensor '{}' ({}): {}", info.name, name_of(info.role), fault);
  }
}

/// Counts messages and texts before the parser makes objects of them: a byte of payload could claim a
/// hundred of memory.
void count_items(CodedInputStream& in, int parent, int64_t& items) {
  while (const uint32_t tag = in.ReadTag()) {
    const int field = WireFormatLite::GetTagFieldNumber(tag);
    bool good = false;
    uint32_t size = 0;
    uint64_t ignored = 0;
    switch (WireFormatLite::GetTagWireType(tag)) {
      case WireFormatLite::WIRETYPE_VARINT:
        good = in.ReadVarint64(&ignored);
        break;
      case WireFormatLite::WIRETYPE_FIXED64:
        good = in.Skip(8);
        break;
      case WireFormatLite::WIRETYPE_FIXED32:
        good = in.Skip(4);
        break;
      case WireFormatLite::WIRETYPE_LENGTH_DELIMITED: {
        good = in.ReadVarint32(&size) && size <= static_cast<uint32_t>(in.BytesUntilLimit());
        require(++items <= kMaxItems, "it has more than {} parts", kMaxItems);
        const bool is_tensor = parent == 0 && field == format::Manifest::kTensorsFieldNumber;
        const bool has_parts = (parent == 0 && (is_tensor || field == format::Manifest::kRunFieldNumber ||
                                                field == format::Manifest::kFilesFieldNumber)) ||
                               (parent == format::Manifest::kTensorsFieldNumber &&
                                field == format::LogicalTensor::kPiecesFieldNumber);
        if (good && has_parts) {
          const auto limit = in.PushLimit(static_cast<int>(size));
          count_items(in, is_tensor ? field : -1, items);
          in.PopLimit(limit);
        } else if (good) {
          good = in.Skip(static_cast<int>(size));
        }
        break;
      }
      default:
        break;
    }
    require(good, "its payload is malformed");
  }
  require(in.BytesUntilLimit() == 0, "its payload is malformed");
}

std::string_view payload_of(std::string_view bytes) {
  require(bytes.size() >= kHeadBytes + kTailBytes, "it has only {} bytes", bytes.size());
  require(static_cast<int64_t>(bytes.size()) <= kMaxManifestBytes, "it has {} bytes", bytes.size());
  require(bytes.starts_with(kHead), "it does not begin as a MANIFEST does");
  require(checksum_of(as_bytes(bytes.substr(0, 24))) == number_at<uint64_t>(bytes, 24),
          "the checksum of its head is wrong");
  const auto version = number_at<uint32_t>(bytes, 8);
  if (version > kFrameVersion) {
    throw DataError(fmt::format("it has frame version {}, this program reads {}", version, kFrameVersion));
  }
  require(version == kFrameVersion && number_at<uint32_t>(bytes, 12) == 0, "its head is malformed");
  require(number_at<uint64_t>(bytes, 16) == bytes.size() - kHeadBytes - kTailBytes,
          "it was cut or extended: {} bytes, where its payload has {}", bytes.size(),
          number_at<uint64_t>(bytes, 16));
  require(bytes.ends_with(kTail), "it does not end as a MANIFEST does");
  const std::string_view payload = bytes.substr(kHeadBytes, bytes.size() - kHeadBytes - kTailBytes);
  require(checksum_of(as_bytes(payload)) == number_at<uint64_t>(bytes, bytes.size() - kTailBytes),
          "the checksum of its payload is wrong");
  return payload;
}

format::Manifest parse_payload(std::string_view payload) {
  const auto* data = reinterpret_cast<const uint8_t*>(payload.data());
  CodedInputStream counting(data, static_cast<int>(payload.size()));
  const auto limit = counting.PushLimit(static_cast<int>(payload.size()));
  int64_t items = 0;
  count_items(counting, 0, items);
  counting.PopLimit(limit);
  format::Manifest manifest;
  require(manifest.ParseFromArray(data, static_cast<int>(payload.size())), "its payload is malformed");
  return manifest;
}

void check_version(const format::Manifest& m) {
  if (m.min_reader_version() > kFormatVersion) {
    throw DataError(fmt::format("it needs a program that reads format {}; this one reads {}",
                                m.min_reader_version(), kFormatVersion));
  }
  if (m.required_features_size() > 0) {
    throw DataError(
        fmt::format("it needs the feature '{}', which this program lacks", m.required_features(0)));
  }
  require(m.format_version() >= 1 && m.min_reader_version() >= 1, "it states no format version");
}

Manifest take_manifest(const format::Manifest& m) {
  check_version(m);
  require(m.files_size() <= kMaxFiles, "it lists {} files", m.files_size());
  require(m.tensors_size() <= kMaxTensors, "it lists {} tensors", m.tensors_size());
  Manifest manifest;
  manifest.info = take_info(m.run());
  manifest.block_bytes = to_count(m.block_bytes(), "the size of a block");
  require(is_block_size(manifest.block_bytes), "a block has {} bytes", manifest.block_bytes);
  for (const format::DataFile& f : m.files()) manifest.files.push_back(take_file(f));
  for (const format::LogicalTensor& t : m.tensors()) manifest.tensors.push_back(take_tensor(t));
  check_files(manifest.files);
  check_files_are_filled(manifest);
  check_tensors(manifest.tensors);
  return manifest;
}

}  // namespace

std::string_view name_of(Role role) {
  switch (role) {
    case Role::parameter:
      return "parameter";
    case Role::master:
      return "master";
    case Role::moment1:
      return "moment1";
    case Role::moment2:
      return "moment2";
  }
  return "?";
}

uint64_t checksum_of(std::span<const std::byte> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string write_manifest(const Manifest& manifest) {
  format::Manifest m;
  m.set_format_version(kFormatVersion);
  m.set_min_reader_version(1);
  put_info(manifest.info, *m.mutable_run());
  m.set_block_bytes(static_cast<uint64_t>(manifest.block_bytes));
  for (const DataFile& file : manifest.files) put_file(file, *m.add_files());
  for (const StoredTensor& tensor : manifest.tensors) put_tensor(tensor, *m.add_tensors());
  const std::string payload = serialise(m);
  std::string bytes(kHead);
  append_number(bytes, kFrameVersion);
  append_number(bytes, uint32_t{0});
  append_number(bytes, uint64_t{payload.size()});
  append_number(bytes, checksum_of(as_bytes(bytes)));
  bytes += payload;
  append_number(bytes, checksum_of(as_bytes(payload)));
  bytes += kTail;
  if (static_cast<int64_t>(bytes.size()) > kMaxManifestBytes) {
    throw IoError(
        fmt::format("the manifest would have {} bytes; {} is the most", bytes.size(), kMaxManifestBytes));
  }
  return bytes;
}

Manifest read_manifest(std::string_view bytes, const std::string& where) {
  try {
    return take_manifest(parse_payload(payload_of(bytes)));
  } catch (const Fault& fault) {
    throw DamagedCheckpoint(fmt::format("{} is damaged: {}", where, fault.reason));
  } catch (const DataError& e) {
    throw DataError(fmt::format("{} cannot be read: {}", where, e.what()));
  }
}

std::string write_report(const RankReport& report) {
  format::RankReport r;
  r.set_failure(report.failure);
  put_file(report.file, *r.mutable_file());
  for (const StoredTensor& tensor : report.tensors) put_tensor(tensor, *r.add_tensors());
  r.set_copy_seconds(report.copy_seconds);
  r.set_write_seconds(report.write_seconds);
  return serialise(r);
}

RankReport read_report(const std::string& bytes) {
  format::RankReport r;
  NF_CHECK(r.ParseFromString(bytes), "a rank's report is malformed");
  try {
    RankReport report{r.failure(), take_file(r.file()), {}, r.copy_seconds(), r.write_seconds()};
    for (const format::LogicalTensor& t : r.tensors()) report.tensors.push_back(take_tensor(t));
    return report;
  } catch (const Fault& fault) {
    NF_CHECK(false, "a rank's report is wrong: {}", fault.reason);
  }
}

}  // namespace normformer
