// The job of a form: one run at a time, a button that starts and stops it, a status line and an error line.

import { Failure } from "./api.js";

export class Job {
  /** work(signal) does a run and returns its final status. stopped() returns the status of a stopped run. */
  constructor({ form, button, status, error, work, stopped }) {
    Object.assign(this, { form, button, status, error, work, stopped });
    this.label = button.textContent;
    this.controller = null;
    this.ending = null; // a promise that resolves at the end of the latest run
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.controller) this.stop();
      else this.start();
    });
  }

  stop() {
    this.controller?.abort(); // the server notices the disconnect and frees the row
  }

  start() {
    if (!this.controller) this.ending = this.run();
  }

  async restart() {
    this.stop();
    await this.ending;
    this.start();
  }

  async run() {
    const controller = (this.controller = new AbortController());
    this.button.textContent = "Stop";
    this.form.setAttribute("aria-busy", "true");
    this.error.hidden = true;
    try {
      this.status.textContent = await this.work(controller.signal);
    } catch (error) {
      if (controller.signal.aborted) this.status.textContent = this.stopped();
      else this.fail(error);
    } finally {
      this.controller = null;
      this.button.textContent = this.label;
      this.form.removeAttribute("aria-busy");
    }
  }

  fail(error) {
    this.status.textContent = "";
    this.error.textContent = error.message;
    this.error.hidden = false;
    if (!(error instanceof Failure)) throw error; // a bug: show it in the console too
  }
}

/** Ctrl or Cmd + Enter inside `area` starts the job, Escape anywhere stops it. */
export function bindKeys(area, job) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    event.preventDefault();
    job.start();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) job.stop();
  });
}
