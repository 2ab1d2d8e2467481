#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <unistd.h>

#include "normformer/core/error.h"

#include "commands.h"
#include "ranks.h"

namespace normformer {

namespace {

struct ReportOptions {
  std::vector<std::string> runs;
  std::string output = "report";
  std::string target_perplexity;
  std::string names;
};

std::filesystem::path scripts() {
  const char* said = std::getenv("NORMFORMER_REPORT");
  const std::filesystem::path folder = said != nullptr ? said : NORMFORMER_REPORT_SCRIPTS;
  if (!std::filesystem::exists(folder / "__main__.py")) {
    throw ConfigError(
        fmt::format("the report's scripts are not in {}: set NORMFORMER_REPORT to the folder launch/report "
                    "of normformer's sources",
                    folder.string()));
  }
  return folder;
}

// The system's own is the one for which its packages bring matplotlib.
std::string python() {
  if (const char* said = std::getenv("NORMFORMER_PYTHON")) return said;
  const char* of_system = "/usr/bin/python3";
  return access(of_system, X_OK) == 0 ? of_system : "python3";
}

std::vector<std::string> words_of(const ReportOptions& options) {
  std::vector<std::string> words = {python(), "-B", scripts().string(), "--output=" + options.output};
  if (!options.target_perplexity.empty()) words.push_back("--target-perplexity=" + options.target_perplexity);
  if (!options.names.empty()) words.push_back("--names=" + options.names);
  words.emplace_back("--");
  words.insert(words.end(), options.runs.begin(), options.runs.end());
  return words;
}

// The scripts take this process' place, and its exit code is theirs.
[[noreturn]] void become(std::vector<std::string> words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  execvp(pointers.front(), pointers.data());
  throw ConfigError(
      fmt::format("cannot start {} ({}), which draws reports: install Python 3.11 or newer with "
                  "matplotlib, and name it in NORMFORMER_PYTHON",
                  words.front(), system_reason()));
}

}  // namespace

void add_report_command(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<ReportOptions>();
  CLI::App* command =
      app.add_subcommand("report", "Compare runs: one HTML page, and a PNG of each of its figures");
  command->add_option("runs", options->runs, "Runs' folders; a folder that is none stands for the runs in it")
      ->required();
  command->add_option("--output", options->output, "The folder to write index.html and the PNGs to")
      ->capture_default_str();
  command->add_option("--target-perplexity", options->target_perplexity,
                      "Measure the speed to this validation perplexity, not to each baseline's final one");
  command->add_option("--names", options->names,
                      "Names of the runs, separated by commas; runs named alike are seeds of one");
  command->callback([options, &chosen] {
    chosen = [options](int*, char***) -> int {
      require_single_process("report");
      become(words_of(*options));
    };
  });
}

}  // namespace normformer
