"""The `ssah-fast` command: imports a subcommand when it is called, and turns errors into one line and an exit code."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from ssah_fast import __version__
from ssah_fast.cli.common import CONTEXT_SETTINGS, is_disk_full
from ssah_fast.errors import OutOfMemoryError, SsahError

# name -> (module:attribute, help). The help is here as well, because `ssah-fast --help` must not import the commands.
COMMANDS = {
    "score": ("ssah_fast.cli.score:score", "Measure the importance of every unit on a safety set and a utility set."),
    "identify": ("ssah_fast.cli.identify:identify", "Turn scores into categories: SCU, UCU, CU, RU."),
    "inspect": ("ssah_fast.cli.inspect:inspect", "Show what is in a scores, units or mask file, layer by layer."),
    "diff": ("ssah_fast.cli.diff:diff", "Compare two units files or two mask files, layer by layer."),
    "finetune": ("ssah_fast.cli.finetune:finetune", "Train a model while what a mask freezes stays bit-identical."),
    "verify": ("ssah_fast.cli.verify:verify", "Prove that what was frozen is bit-identical; writes a certificate."),
    "eval": ("ssah_fast.cli.eval:evaluate", "Attack success rate, over-refusal and utility of a model."),
    "ablate": ("ssah_fast.cli.ablate:ablate", "Zero categories of units in memory and measure what is lost."),
    "probe": ("ssah_fast.cli.probe:probe", "Compare hidden states of a query, and with a refusal or an answer begun."),
    "transfer": ("ssah_fast.cli.transfer:transfer", "Show which units changed their category between two units files."),
    "landscape": ("ssah_fast.cli.landscape:landscape", "Safety and utility around the weights of a model; VISAGE."),
    "run": ("ssah_fast.cli.run:run", "Run a recipe: all of these as one resumable pipeline."),
    "report": ("ssah_fast.cli.report:report", "Make one page of everything a folder holds."),
    "bench": ("ssah_fast.cli.bench:bench", "Measure every op beside its alternatives and the hardware's limit."),
    "env": ("ssah_fast.cli.env:env", "Show devices, versions, backends, and why one is missing."),
    "demo": ("ssah_fast.cli.demo:demo", "Show the whole way on a small chat model that is trained here."),
}
OOM_ADVICE = "out of memory: use a smaller --batch-size or --seqlen, --dtype bf16, or another --device"


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, "-v", "--version", prog_name="ssah-fast")
def cli() -> None:
    """Find the few neurons that carry a language model's safety.

    Every command has --help. Results go to stdout, progress to stderr. Exit codes: 0 done, 1 the run failed,
    2 wrong use, 3 a check failed, 4 a checkpoint is of another run, 5 out of memory, 130 interrupted, 143 terminated.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the console entry point.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code. Errors are one line on stderr; SSAH_FAST_LOG_LEVEL=debug adds the traceback.
    """
    try:
        code = cli.main(args=arguments, prog_name="ssah-fast", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone. Without this, the interpreter's own flush at exit would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort) as error:  # click raises the latter from the former
        click.echo(f"ssah-fast: {str(error.__cause__ or error) or 'interrupted'}", err=True)
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        click.echo(f"ssah-fast: error: {' '.join(error.format_message().split())}{hint}", err=True)
        return error.exit_code
    except Exception as error:  # the one place where an unforeseen error ends
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    message, code = _explain(error)
    if os.environ.get("SSAH_FAST_LOG_LEVEL", "").lower() == "debug":
        traceback.print_exception(error)
    click.echo(f"ssah-fast: error: {' '.join(message.split())}", err=True)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    """The message for an error and its exit code."""
    if isinstance(error, SsahError):
        return str(error), error.exit_code
    if _is_out_of_memory(error):
        return OOM_ADVICE, OutOfMemoryError.exit_code
    if is_disk_full(error):
        return f"no space left on the disk ({error})", 1
    advice = "set SSAH_FAST_LOG_LEVEL=debug for the traceback; please report it"
    return f"internal error: {type(error).__name__}: {error} ({advice})", 1


def _is_out_of_memory(error: Exception) -> bool:
    # torch is imported only if the command did; its CPU allocator raises a plain RuntimeError.
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_device or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


if __name__ == "__main__":
    sys.exit(main())
