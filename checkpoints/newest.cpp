#include <charconv>
#include <utility>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/log.h"

#include "agree.h"
#include "manifest.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

/// What one rank found of one checkpoint, told to the others as text.
struct Finding {
  enum class Kind : char { good = 'g', damaged = 'd', refused = 'r' };
  Kind kind = Kind::good;
  ExitCode code = ExitCode::success;  ///< of an error that no older checkpoint would mend
  std::string text;                   ///< why, or what the finder adds

  std::string encode() const {
    return fmt::format("{}{:03}{}", static_cast<char>(kind), static_cast<int>(code), text);
  }

  static Finding decode(const std::string& bytes) {
    int code = 0;
    std::from_chars(bytes.data() + 1, bytes.data() + 4, code);
    return {static_cast<Kind>(bytes.at(0)), static_cast<ExitCode>(code), bytes.substr(4)};
  }
};

Finding find_out(const std::function<std::string()>& body) {
  try {
    return {Finding::Kind::good, ExitCode::success, body()};
  } catch (const DamagedCheckpoint& e) {
    return {Finding::Kind::damaged, e.exit_code(), e.what()};
  } catch (const IoError& e) {
    return {Finding::Kind::damaged, e.exit_code(), e.what()};
  } catch (const Error& e) {
    return {Finding::Kind::refused, e.exit_code(), e.what()};
  }
}

/// The worst of all ranks' findings. Throws, on all ranks, where any refused. Collective over `world`.
Finding agree(const Group& world, const Finding& mine) {
  std::vector<Finding> findings;
  for (const std::string& bytes : world.all_gather_text(mine.encode()))
    findings.push_back(Finding::decode(bytes));
  for (const Finding& finding : findings) {
    if (finding.kind == Finding::Kind::refused) throw Error(finding.code, finding.text);
  }
  for (const Finding& finding : findings) {
    if (finding.kind == Finding::Kind::damaged) return finding;
  }
  return findings.front();
}

std::vector<std::string> list_on_root(const Group& world, FileSystem& files, const fs::path& folder) {
  const auto found = find_out([&] {
    std::string names;
    if (world.rank() != 0) return names;
    for (const std::string& name : list_checkpoints(files, folder)) names += name + "\n";
    return names;
  });
  const Finding agreed = agree(world, found);
  if (agreed.kind == Finding::Kind::damaged) throw IoError(agreed.text);
  std::vector<std::string> names;
  for (size_t begin = 0; begin < agreed.text.size();) {
    const size_t end = agreed.text.find('\n', begin);
    names.push_back(agreed.text.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

}  // namespace

std::optional<CheckpointReader> open_newest_checkpoint(
    const Group& world, FileSystem& files, const fs::path& folder,
    const std::function<void(const CheckpointReader&)>& use, bool older_too) {
  const std::vector<std::string> names = list_on_root(world, files, folder);
  std::string newest_reason;
  for (const std::string& name : names) {
    // Rank 0 reads the manifest and looks at every file; the others take its bytes, so that all know the
    // same.
    Finding finding = agree(world, find_out([&]() -> std::string {
                              if (world.rank() != 0) return "";
                              std::string manifest = read_manifest_file(files, folder / name);
                              CheckpointReader(files, folder / name, manifest).check_files();
                              return manifest;
                            }));
    if (finding.kind == Finding::Kind::good) {
      const CheckpointReader reader(files, folder / name, finding.text);
      finding = agree(world, find_out([&]() -> std::string {
                        use(reader);
                        return "";
                      }));
      if (finding.kind == Finding::Kind::good) return reader;
    }
    if (!older_too) {
      throw DataError(
          fmt::format("the newest checkpoint, {}, cannot be used: {}. Restore it, or set "
                      "checkpoint.on_damage = \"older\" to go on from the one before",
                      (folder / name).string(), finding.text));
    }
    if (newest_reason.empty()) newest_reason = finding.text;
    log_root(LogLevel::error, "cannot use {}: {}", (folder / name).string(), finding.text);
  }
  if (names.empty()) return std::nullopt;
  throw DataError(
      fmt::format("none of the {} checkpoints in {} can be read; the newest: {}. Restore one, or name "
                  "another folder to start anew",
                  names.size(), folder.string(), newest_reason));
}

}  // namespace normformer
