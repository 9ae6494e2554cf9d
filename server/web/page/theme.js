// Applies the stored theme before the first paint, so that nothing flashes. A classic script in the head; app.js changes
// the theme.
"use strict";
try {
  const theme = localStorage.getItem("allattn.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* no storage: the page follows the system's theme */ }
