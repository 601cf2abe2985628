# docker build -f launch/serve.Dockerfile -t recursive-jax-serve .
# docker run -p 127.0.0.1:8000:8000 recursive-jax-serve                       the embedded model
# docker run -p 127.0.0.1:8000:8000 -v CKPT:/model:ro recursive-jax-serve --checkpoint=/model
FROM python:3.12-slim
WORKDIR /app
# A compiler: decoding on a CPU compiles its kernels at the first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . .
RUN pip install --no-cache-dir ".[serve,gguf]" && useradd --create-home serve
USER serve
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
# The container's own address: what is reachable from outside is chosen by `docker run -p`.
ENTRYPOINT ["python", "-m", "recursive_jax.serve", "--host=0.0.0.0"]
CMD ["--checkpoint=tiny"]
