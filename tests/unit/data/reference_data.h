#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include <gtest/gtest.h>

namespace normformer {

/// The folder of reference texts and tokenizers, which are not part of the repository: "data" under what
/// the environment's NORMFORMER_TEST_DATA names, else beside the source tree.
inline std::filesystem::path reference_data() {
  const char* const given = std::getenv("NORMFORMER_TEST_DATA");
  return std::filesystem::path(given != nullptr ? given : NORMFORMER_TEST_DATA_DEFAULT) / "data";
}

/// A file that is part of the repository, under tests/fixtures/data/.
inline std::filesystem::path fixture(const std::string& name) {
  return std::filesystem::path(NORMFORMER_TEST_FIXTURES) / "data" / name;
}

}  // namespace normformer

/// Skips the test where the reference data is absent.
#define NF_NEED_REFERENCE_DATA()                                                            \
  do {                                                                                      \
    if (!std::filesystem::exists(::normformer::reference_data())) {                         \
      GTEST_SKIP() << "no reference data at " << ::normformer::reference_data()             \
                   << "; name its folder in the environment variable NORMFORMER_TEST_DATA"; \
    }                                                                                       \
  } while (false)
