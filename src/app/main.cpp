#include <cstdio>

#include "normformer/core/error.h"

#include "commands.h"

int main(int argc, char** argv) {
  CLI::App app{"Trains GPT-style language models, baseline and NormFormer, over many processes.",
               "normformer"};
  app.require_subcommand(1);
  app.set_version_flag("--version", NORMFORMER_VERSION);
  normformer::Command chosen;
  normformer::add_prepare_command(app, chosen);
  normformer::add_train_command(app, chosen);
  normformer::add_eval_command(app, chosen);
  normformer::add_eval_tasks_command(app, chosen);
  normformer::add_generate_command(app, chosen);
  normformer::add_checkpoint_command(app, chosen);
  normformer::add_plan_command(app, chosen);
  normformer::add_ledger_command(app, chosen);
  normformer::add_report_command(app, chosen);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e);
    return code == 0 ? 0 : static_cast<int>(normformer::ExitCode::bad_usage);
  }
  try {
    return chosen(&argc, &argv);
  } catch (...) {
    std::fprintf(stderr, "normformer: %s\n", normformer::describe_current_exception().c_str());
    return static_cast<int>(normformer::current_exception_exit_code());
  }
}
