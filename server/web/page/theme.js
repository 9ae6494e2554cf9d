// Light or dark before the first paint, so that nothing flashes: a classic script in the head. The rest is in app.js.
"use strict";
try {
  const theme = localStorage.getItem("allattn.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is refused: the system's theme it is */ }
