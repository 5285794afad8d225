"""One thin file a command: options -> settings -> one library call -> what to print.

How a command is added:

1. Write `mmm4rec_cli/commands/<name>.py` with one function of that name. Its first parameter is the `Invocation`, which
   carries the options that every command has (`--workspace`, `--config`, `--set`, `--json`, `--quiet`); the others are
   its own options, in Typer's notation. It returns a `Result`:

       @command("mmm4rec count --domain pantry")
       def count(
           invocation: Invocation,
           domain: Annotated[str, typer.Option(help="domain whose interactions are counted")] = "scientific",
           min_user: Annotated[
               int | None, typer.Option(help="interactions a user must have", show_default="data.min_user = 5")
           ] = None,
       ) -> Result:
           \"\"\"Count the interactions of a domain.\"\"\"
           from mmm4rec_cli.data.tables import read_tables

           settings = invocation.settings(domain=domain, options={"data.min_user": min_user})
           n = count_interactions(invocation.workspace, domain, settings.data, reporter=invocation.reporter)
           return Result({"domain": domain, "n": n}, f"{n} interactions", next=f"mmm4rec pretrain --domain {domain}")

   Imports of torch, polars, pyarrow, numpy, transformers, pydantic and of every room that needs them go inside the
   function: `mmm4rec --help` must stay quick. The first line of the docstring is the command's help, the texts in
   `command(…)` are its examples. An option that is a setting has the default None and is passed through `options=`,
   so that the order of the sources holds; its `show_default` reads "section.key = value" (a test compares it with the
   settings). Bad input is raised as one of `mmm4rec_cli.errors`.
2. Enter the function in the table in `mmm4rec_cli/app.py`.
3. Test it in `tests/commands/test_<name>.py` through `mmm4rec_cli.app.main([...])`, which returns the exit code.
"""
