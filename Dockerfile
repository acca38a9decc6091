# The service on a CPU:
#   docker build -t sparse-engine . && docker run -p 127.0.0.1:8000:8000 -v ./engines:/engines:ro sparse-engine
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /src/constraints.txt /wheels/
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[cpu,serve]"
# What was timed on this machine is remembered there: mount a volume, or every start times it again.
RUN useradd --create-home --uid 10001 engine && install -d -o engine /home/engine/.cache
USER engine
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live')"]
ENTRYPOINT ["sparse-engine", "serve", "--host", "0.0.0.0"]
CMD ["/engines/model.sengine"]
