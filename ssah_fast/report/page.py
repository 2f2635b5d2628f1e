"""The page: one HTML file with everything in it, which may run its own two scripts and fetch nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jinja2

import ssah_fast
from ssah_fast.errors import SsahError
from ssah_fast.report.collect import Evidence
from ssah_fast.report.figures import THEME, Section

# Told to plotly by the page in the dark; figures.THEME is the light one.
DARK = {"@ink": "#ececec", "@quiet": "#a8a8a8", "@grid": "#3a3a3a", "@paper": "#161616"}
_NARROW = 640  # px; the width below which a figure takes its phone layout

# Draws every figure, and again where the width, the colours or the medium change. Texts of figures come from files:
# plotly knows a few harmless tags (<b>, <sub>, <br>) and shows anything else as text.
_SCRIPT = """
(function () {
  "use strict";
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var themes = JSON.parse(document.getElementById("themes").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var printing = false;
  function themed(value, theme) {
    var text = JSON.stringify(value);
    Object.keys(theme).forEach(function (name) { text = text.split(name).join(theme[name]); });
    return JSON.parse(text);
  }
  function set(layout, path, value) {
    var names = path.split("."), last = names.pop();
    names.reduce(function (place, name) { return place[name] = place[name] || {}; }, layout)[last] = value;
  }
  function draw() {
    var theme = themes[dark.matches && !printing ? "dark" : "light"];
    figures.forEach(function (figure) {
      var place = document.getElementById("plot-" + figure.name);
      var made = themed(figure, theme), width = place.clientWidth;
      if (width < NARROW) {
        Object.keys(made.narrow).forEach(function (path) { set(made.layout, path, made.narrow[path]); });
      }
      made.layout.width = width;
      // Anew and not by react, which moves the parts of a flow diagram in half a second: paper does not wait.
      Plotly.newPlot(place, made.data, made.layout, {displayModeBar: false, showTips: false});
      place.setAttribute("data-drawn", String(width));
    });
  }
  var main = document.querySelector("main"), waiting = 0, drawn = main.clientWidth;
  // Covers the turned phone, the resized window and the scroll bar that appears only once there is something to scroll.
  new ResizeObserver(function () {
    if (main.clientWidth === drawn || printing) { return; }
    drawn = main.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 60);
  }).observe(main);
  window.addEventListener("beforeprint", function () {
    printing = true;
    document.body.classList.add("printing");
    draw();
  });
  window.addEventListener("afterprint", function () {
    printing = false;
    document.body.classList.remove("printing");
    draw();
  });
  dark.addEventListener("change", draw);
  draw();
})();
""".replace("NARROW", str(_NARROW))


def plotly_script() -> str:
    """The source of plotly.js.

    Raises:
        SsahError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise SsahError("a report needs plotly; install it with: pip install 'ssah_fast[report]'") from error
    # HTML reads a carriage return as a newline, and the hash of the policy is of what was read.
    return str(get_plotlyjs()).replace("\r", "")


def render(evidence: Evidence, sections: Sequence[Section], plotly: str) -> str:
    """The page as HTML.

    Args:
        evidence: for the title.
        sections: in their order on the page.
        plotly: the source of plotly.js; left out where there is no figure.
    """
    figures = [figure.json() for section in sections for figure in section.figures]
    scripts = [plotly, _SCRIPT] if figures else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssah_fast.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        title=_title(evidence),
        sections=sections,
        figures=figures,
        themes={"light": THEME, "dark": DARK},
        policy=_policy(scripts),
        scripts=scripts,
        version=ssah_fast.__version__,
        colour=_css,
    )


def _title(evidence: Evidence) -> str:
    titles = [source.content.get("title") for source in evidence.runs]
    return str(next(filter(None, titles), None) or os.path.basename(os.path.abspath(evidence.directory)))


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy: no request at all, no script but those whose hashes are named."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    # plotly styles by <style> and style="", and draws maps of squares into data: images.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"form-action 'none'; base-uri 'none'"
    )


def _css(colour: str) -> Any:
    """A colour of a figure as the page's style sheet names it."""
    return f"var(--{colour[1:]})" if colour.startswith("@") else colour
