// Before anything is painted: the theme that was chosen, so that the page does not flash in the other one.
{
  const kept = (name) => {
    try {
      return JSON.parse(localStorage.getItem(`tapeline.${name}`));
    } catch {
      return null; // Storage may be forbidden: the system's theme then.
    }
  };
  const asked = new URLSearchParams(location.search).get("theme");
  const theme = [asked, kept("theme")].find((name) => name === "dark" || name === "light");
  if (theme) document.documentElement.dataset.theme = theme;
  if (kept("palette") === "green") document.documentElement.dataset.palette = "green";
}
