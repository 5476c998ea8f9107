// Uploads by drag and drop with a progress bar. Everything else works without this file.
"use strict";
(() => {
  const form = document.querySelector("form.drop");
  if (!form) return;
  const input = form.querySelector("input[type=file]");
  const bar = form.querySelector("progress");
  const status = form.querySelector("[role=status]");

  function send(file) {
    const body = new FormData();
    body.append("purpose", "batch");
    body.append("file", file);
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/files");
    bar.hidden = false;
    request.upload.addEventListener("progress", (event) => {
      if (!event.lengthComputable) return;
      bar.max = event.total;
      bar.value = event.loaded;
      status.textContent = `Sending ${file.name}: ${Math.round((100 * event.loaded) / event.total)}%`;
    });
    request.addEventListener("load", () => {
      if (request.status === 200) {
        window.location.assign(`/files?new=${encodeURIComponent(JSON.parse(request.responseText).id)}`);
        return;
      }
      let message = `The service answered ${request.status}.`;
      try { message = JSON.parse(request.responseText).error.message; } catch (error) { /* no JSON */ }
      bar.hidden = true;
      status.textContent = message;
    });
    request.addEventListener("error", () => {
      bar.hidden = true;
      status.textContent = "The service does not answer. Is it still running?";
    });
    request.send(body);
  }

  form.addEventListener("submit", (event) => {
    if (!input.files.length) return;
    event.preventDefault();
    send(input.files[0]);
  });
  for (const name of ["dragenter", "dragover"]) {
    form.addEventListener(name, (event) => { event.preventDefault(); form.classList.add("over"); });
  }
  for (const name of ["dragleave", "drop"]) {
    form.addEventListener(name, () => form.classList.remove("over"));
  }
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
})();
